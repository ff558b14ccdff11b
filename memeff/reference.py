"""Linear cross entropy in plain PyTorch: the definition of what memeff's kernels compute.

It stores the logits, in float32 (float64 for float64 inputs), and lets autograd do the rest. It
runs wherever PyTorch runs; ``memeff.linear_cross_entropy(..., backend="reference")`` calls it.

With x an input row, W and b the classifier, y the target, w the class weights (1 without) and eps
the label smoothing, the loss of one token is

    z    = softcap * tanh(logit_scale * (x W^T + b) / softcap)        (no softcap: the inner part)
    lse  = log sum_v exp z_v,    log p_v = z_v - lse
    loss = -(1 - eps) * w_y * log p_y  -  eps / V * sum_v w_v * log p_v  +  z_loss * lse^2

and for class probabilities q its first two terms are -sum_v w_v ((1 - eps) q_v + eps / V) log p_v.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, one_hot

from memeff.statistics import LogitStatistics, TokenStatistics

__all__ = ["linear_cross_entropy", "linear_token_statistics"]


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    shift: bool | int = False,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """Return what `memeff.linear_cross_entropy` returns; see there for the arguments."""
    if shift:
        input, target, token_weight = shifted_pairs(input, target, token_weight, int(shift))

    tokens = input.shape[:-1] + linear_weight.shape[1:-1]
    probabilities = target.dim() == len(tokens) + 1 and target.is_floating_point()
    if not probabilities:
        counted = target.reshape(tokens) != (-100 if ignore_index is None else ignore_index)
        # Masking results would leave 0 * nan in the gradient of the weight.
        kept = counted.reshape(*input.shape[:-1], linear_weight.shape[1:-1].numel()).any(
            -1, keepdim=True
        )
        input = torch.where(kept, input, 0)
    logits = compute_logits(input, linear_weight, linear_bias, softcap, logit_scale)  # [..., V]
    vocab = logits.shape[-1]
    lse = logits.logsumexp(-1)
    log_p = logits.log_softmax(-1)

    if probabilities:
        class_dim = input.dim() - 1  # as in the logits of torch: after the batch dimensions
        q = target.movedim(class_dim, -1).to(log_p.dtype)
        counted = torch.ones_like(lse, dtype=torch.bool)
        index = q.argmax(-1) if vocab else counted.long()
        target_logit = (q * logits).sum(-1)
    else:
        if vocab == 0 and counted.any():
            raise IndexError("target has class indices, but linear_weight has no classes (V = 0)")
        index = target.reshape(lse.shape).long().where(counted, 0)
        target_logit = _pick(logits, index)

    w = log_p.new_ones(vocab) if weight is None else weight.to(log_p.dtype)
    if probabilities or label_smoothing:
        q = q if probabilities else one_hot(index, vocab).to(log_p.dtype)
        q = (1 - label_smoothing) * q + label_smoothing / max(vocab, 1)
        cross_entropy = -(w * q * log_p).sum(-1)
    else:
        cross_entropy = -_pick(w.expand_as(log_p), index) * _pick(log_p, index)

    scale = counted
    if token_weight is not None:
        scale = token_weight.reshape(lse.shape).where(counted, 0)
    cross_entropy = (cross_entropy * scale).where(counted, 0)
    z_term = (z_loss * lse.square() * scale).where(counted, 0)
    per_token = cross_entropy + z_term

    if reduction == "none":
        loss = per_token
    elif reduction == "sum":
        loss = per_token.sum()
    elif num_items is not None:
        loss = (per_token.sum() / num_items).to(per_token.dtype)
    else:
        divisor = counted.sum()
        if weight is not None and not probabilities:
            divisor = _pick(w.expand_as(log_p), index).where(counted, 0).sum()
        loss = cross_entropy.sum() / divisor + z_term.sum() / counted.sum()

    if not return_statistics:
        return loss
    argmax = logits.argmax(-1)
    statistics = TokenStatistics(
        loss=per_token,
        lse=lse,
        target_logit=target_logit,
        logprob=target_logit - lse,
        entropy=entropy_of(log_p),
        max_logit=logits.amax(-1),
        argmax=argmax,
        correct=argmax == index,
    )
    return loss, TokenStatistics(*(value.detach().masked_fill(~counted, 0) for value in statistics))


def linear_token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    temperature: Tensor | None = None,
    entropy: bool = True,
    argmax: bool = True,
    logit_sum: bool = False,
    log_sum_sq_probs: bool = False,
    top_k: int = 0,
) -> LogitStatistics:
    """Return what `memeff.linear_token_statistics` returns; see there for the arguments."""
    logits = compute_logits(
        input, linear_weight, linear_bias, softcap, logit_scale, temperature
    )  # [..., V]
    lse, log_p = logits.logsumexp(-1), logits.log_softmax(-1)
    logprob = None
    if target is not None:
        several = target if target.dim() == logits.dim() else target.unsqueeze(-1)
        counted = several != ignore_index
        logprob = log_p.gather(-1, several.long().where(counted, 0)).where(counted, 0)
        logprob = logprob.reshape(target.shape)
    top = log_p.detach().topk(top_k) if top_k else None
    total = logits.sum(-1) if logit_sum else None
    return LogitStatistics(
        logprob=logprob,
        lse=lse,
        entropy=entropy_of(log_p) if entropy else None,
        max_logit=logits.detach().amax(-1),
        argmax=logits.argmax(-1) if argmax else None,
        logit_sum=total,
        mean_logit=None if total is None else total / logits.shape[-1],
        log_sum_sq_probs=(2 * log_p).logsumexp(-1) if log_sum_sq_probs else None,
        top_logprobs=top.values if top else None,
        top_ids=top.indices if top else None,
    )


def compute_logits(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    softcap: float | None,
    logit_scale: float | Tensor,
    temperature: Tensor | None = None,
) -> Tensor:
    """Logits [..., d1, ..., dK, V] of input [..., D] and linear_weight [V, d1, ..., dK, D]; what
    ``logit_scale`` and ``softcap`` give is divided by ``temperature`` [...]."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    rows = linear_weight.movedim(0, -2)  # [d1, ..., dK, V, D]
    bias = None if linear_bias is None else linear_bias.movedim(0, -1).flatten().to(dtype)
    logits = linear(input.to(dtype), rows.flatten(0, -2).to(dtype), bias)
    logits = logits.reshape(input.shape[:-1] + rows.shape[:-1]) * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if temperature is None:
        return logits
    one_per_row = temperature.reshape(*temperature.shape, *[1] * (rows.dim() - 1))
    return logits / one_per_row.to(dtype)


def entropy_of(log_p: Tensor) -> Tensor:
    """-sum_v p_v log p_v [...] of log p [..., V].

    A class with log p = -inf adds 0. It is replaced before the product: masking the product leaves
    0 * inf in its gradient.
    """
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """Entry ``index`` [...] of the last dimension of ``rows`` [..., V]; 0 where V is 0."""
    if rows.shape[-1] == 0:
        return rows.sum(-1)
    return rows.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def shifted_pairs(
    input: Tensor, target: Tensor, token_weight: Tensor | None, distance: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pair input[..., t, :] with the target (and its weight) ``distance`` positions later."""
    time = input.dim() - 2
    kept = max(input.shape[time] - distance, 0)
    distance = min(distance, input.shape[time])
    later = None if token_weight is None else token_weight.narrow(time, distance, kept)
    return input.narrow(time, 0, kept), target.narrow(time, distance, kept), later
