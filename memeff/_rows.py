"""From tensors of any rank to the op, which knows rows: input [N, D], linear_weight [V, D].

Leading dimensions are flattened, ``shift`` becomes a target whose last positions are ignored, and a
K-dimensional linear_weight becomes one call of the op per position, over views of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from memeff._call import Call, RowResults, call_loss
from memeff._checks import SMALL_INDEX_DTYPES
from memeff._positions import each_position
from memeff.reference import shifted_pairs
from memeff.statistics import TokenStatistics
from memeff.vocab_parallel import VocabParallel


def compute(call: Call) -> tuple[Tensor, TokenStatistics | None]:
    """Loss and, if asked for, statistics, of a call of ``linear_cross_entropy``."""
    input, target, token_weight = call.input, call.target, call.token_weight
    options, probabilities = call.options, call.probabilities
    assert target is not None
    if target.dtype in SMALL_INDEX_DTYPES:
        target = target.long()
    kept = None  # positions of the time dimension that have a target
    if options.shift:
        time = input.dim() - 2
        if probabilities:
            # There is no index to ignore; next to a target of [N, V] a copy of input costs nothing.
            input, target, token_weight = shifted_pairs(input, target, token_weight, options.shift)
        else:
            kept = max(input.shape[time] - options.shift, 0)
            target = pull_forward(target, time, options.shift, options.ignore_index)
            if token_weight is not None:
                token_weight = pull_forward(token_weight, time, options.shift, 0)

    leading, positions = input.shape[:-1], call.linear_weight.shape[1:-1]
    if len(leading) != 1:
        input = input.flatten(0, -2) if len(leading) else input.unsqueeze(0)
        target = _flatten_leading(target, len(leading), probabilities)
        if token_weight is not None:
            token_weight = _flatten_leading(token_weight, len(leading), False)
    if input is not call.input or target is not call.target:
        call = call._replace(input=input, target=target, token_weight=token_weight)
    results = each_position(call) if positions else call_loss(call)

    def in_shape(rows: Tensor) -> Tensor:
        shaped = rows.reshape(leading + positions)
        return shaped if kept is None else shaped.narrow(len(leading) - 1, 0, kept)

    loss = in_shape(results.loss) if options.reduction == "none" else results.loss
    if not options.return_statistics:
        return loss, None
    fields = _token_statistics(results, target, call)
    return loss, TokenStatistics(*(in_shape(value) for value in fields))


def pull_forward(tensor: Tensor, dim: int, distance: int, fill: int) -> Tensor:
    """``out[t] = tensor[t + distance]`` along ``dim``, with ``fill`` where there is none."""
    length = tensor.shape[dim]
    distance = min(distance, length)
    later = tensor.narrow(dim, distance, length - distance)
    return pad(later, [0, 0] * (tensor.dim() - 1 - dim) + [0, distance], value=fill)


def _flatten_leading(tensor: Tensor, leading: int, probabilities: bool) -> Tensor:
    """[..., *rest] -> [N, *rest]; one row without leading dimensions gets one."""
    if leading:
        return tensor.flatten(0, leading - 1)
    return tensor.unsqueeze(0) if probabilities else tensor.reshape(1)


def _most_probable(target: Tensor, shared: VocabParallel | None) -> Tensor:
    """[N, ...] the first class of the largest probability [N, V, ...], of all ranks' classes."""
    if shared is None:
        return target.argmax(1)
    first = shared.first_class(target.shape[1], target.device)
    if target.shape[1] == 0:
        target = torch.nn.functional.pad(target, [0, 0] * (target.dim() - 2) + [0, 1], value=-1)
    ids = target.argmax(1, keepdim=True)
    own = torch.cat([target.gather(1, ids).double(), (ids + first).double()], 1)
    values, of_ranks = shared.gather(own).unbind(2)
    return of_ranks.where(values == values.amax(0), torch.inf).amin(0).long()


def _token_statistics(results: RowResults, target: Tensor, call: Call) -> TokenStatistics:
    """The op's packed rows as fields; each [N] or, for K-dimensional weights, [N, P]."""
    loss, target_logit, entropy, max_logit = results.statistics.detach().unbind(0)
    logprob = (target_logit - results.lse).to(loss.dtype)
    probabilities, ignore_index = call.probabilities, call.options.ignore_index
    if probabilities:
        best = _most_probable(target, call.options.vocab_parallel)
        correct = results.argmax == best.reshape(loss.shape)
    else:
        target = target.reshape(loss.shape)
        ignored = target == ignore_index
        correct = (results.argmax == target) & ~ignored
    fields = TokenStatistics(
        loss=loss,
        lse=results.lse.to(loss.dtype),
        target_logit=target_logit,
        logprob=logprob,
        entropy=entropy,
        max_logit=max_logit,
        argmax=results.argmax,
        correct=correct,
    )
    if probabilities:
        return fields
    return TokenStatistics._make(field.masked_fill(ignored, 0) for field in fields)
