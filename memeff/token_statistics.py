"""``linear_token_statistics`` and ``linear_logprobs``: differentiable numbers per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memeff import _arguments, _checks, _rows, reference, statistics_ops
from memeff.statistics import LogitStatistics

__all__ = ["linear_logprobs", "linear_token_statistics"]


def linear_token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = True,
    argmax: bool = True,
    logit_sum: bool = False,
    log_sum_sq_probs: bool = False,
    top_k: int = 0,
    shift: bool | int = False,
    memory_budget: int | str | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> LogitStatistics:
    """Statistics of every row of ``input @ linear_weight.T + linear_bias``, without those logits.

    Log-probability of the target, log-sum-exp, entropy, the sum of the logits and that of squared
    probabilities are differentiable with respect to ``input``, ``linear_weight`` and
    ``linear_bias``, with any upstream gradients. The forward pass
    keeps a few numbers per token; the backward pass computes the logits again, block by block.
    Tokens without an upstream gradient (masked ones) cost it nothing.

    Args:
        input: hidden states [..., D]; bfloat16, float16, float32 or float64.
        linear_weight: classifier [V, D], dtype of ``input``.
        target: class indices [...], or [..., K] for K per token; None for none.
        linear_bias: [V], dtype of ``input``.
        ignore_index: a target that has no log-probability (it becomes 0) and no gradient.
        softcap: c > 0 caps the logits: c * tanh(z / c), after ``logit_scale``.
        logit_scale: multiplies ``input @ linear_weight.T + linear_bias``: 1 / temperature.
        entropy, argmax: whether to compute these.
        logit_sum: whether to compute ``logit_sum`` and ``mean_logit``.
        log_sum_sq_probs: whether to compute this, in a second pass over the logits.
        top_k: number of most probable classes to return, with their log-probabilities (for
            distillation and logging; not differentiable). On the CPU it upcasts bfloat16 rows.
        shift: k > 0 compares input[..., t, :] with target[..., t + k] (True: 1); the results have k
            positions fewer.
        memory_budget: most bytes of workspace beyond results and gradients, as int or like "64MiB".
        chunk_size: tokens that pass through together, for those who want to fix it.
        backend: "cpu", "cuda", "reference" (plain PyTorch, stores the logits), or "auto".

    Returns:
        :class:`memeff.LogitStatistics`. Second derivatives raise an error.

    Raises:
        TypeError, ValueError, RuntimeError: an argument of the wrong type, with a bad value, or
            whose shape, dtype or device does not fit.
        IndexError: a target outside [0, V) that is not ``ignore_index`` (on the CPU).
    """
    return compute_statistics(
        input,
        linear_weight,
        target,
        linear_bias,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        skip_ignored=False,
        entropy=entropy,
        argmax=argmax,
        logit_sum=logit_sum,
        log_sum_sq_probs=log_sum_sq_probs,
        top_k=top_k,
        shift=shift,
        memory_budget=memory_budget,
        chunk_size=chunk_size,
        backend=backend,
    )


def linear_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: bool | int = False,
    memory_budget: int | str | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Differentiable log-probabilities of ``target``, without storing the logits.

    The ``logprob`` of :func:`linear_token_statistics`, and nothing else: tokens whose targets are
    all ``ignore_index`` are not computed at all. Arguments as there, and

    Args:
        temperature: divides the logits, after ``logit_scale`` and ``softcap``.

    Returns:
        log p in the shape of ``target`` (with ``shift``, shorter), float32 or float64; 0 where the
        target is ``ignore_index``.
    """
    _checks.check_number("temperature", temperature)
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, expected a finite value > 0")
    _checks.check_tensor("target", target)
    _checks.check_numbers(0.0, softcap, logit_scale, 0.0)
    statistics = compute_statistics(
        input,
        linear_weight,
        target,
        linear_bias,
        ignore_index=ignore_index,
        # (c / T) tanh((z / T) / (c / T)) = c tanh(z / c) / T
        softcap=None if softcap is None else softcap / temperature,
        logit_scale=logit_scale / temperature,
        skip_ignored=True,
        entropy=False,
        argmax=False,
        top_k=0,
        shift=shift,
        memory_budget=memory_budget,
        chunk_size=chunk_size,
        backend=backend,
    )
    assert statistics.logprob is not None
    return statistics.logprob


def compute_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    linear_bias: Tensor | None,
    *,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    skip_ignored: bool,
    entropy: bool,
    argmax: bool,
    top_k: int,
    shift: bool | int,
    memory_budget: int | str | None,
    chunk_size: int | None,
    backend: str,
    logit_sum: bool = False,
    log_sum_sq_probs: bool = False,
) -> LogitStatistics:
    tensors = {"linear_weight": linear_weight, "target": target, "linear_bias": linear_bias}
    _checks.check_tensor("input", input)
    for name, tensor in tensors.items():
        if tensor is not None or name == "linear_weight":
            _checks.check_tensor(name, tensor)
    check_shapes(input, linear_weight, target, linear_bias)
    cast_to = _arguments.autocast_dtype(input.device)
    if cast_to is not None:
        input = _arguments.autocast_to(input, cast_to)
        linear_weight = _arguments.autocast_to(linear_weight, cast_to)
        linear_bias = None if linear_bias is None else _arguments.autocast_to(linear_bias, cast_to)
    _checks.check_dtypes(input, linear_weight, linear_bias, None, None)
    for name, tensor in tensors.items():
        _checks.check_device(input.device, name, tensor)
    _checks.check_ignore_index(ignore_index, probabilities=False)
    _checks.check_numbers(0.0, softcap, logit_scale, 0.0)
    _checks.check_shift(shift, input.shape[:-1])
    vocab = linear_weight.shape[0]
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k must be an int, got {type(top_k).__name__}")
    if not 0 <= top_k <= vocab:
        raise ValueError(f"top_k is {top_k}, expected a number of classes in [0, {vocab}]")
    budget = _arguments.parse_memory_budget(memory_budget)
    chunk = _arguments.parse_chunk_size(chunk_size)
    resolved = _arguments.resolve_backend(backend, input.device, needs_reference=False)

    kept = None
    if shift:
        if target is None:
            raise ValueError(f"shift is {shift}, expected 0: there is no target")
        time = input.dim() - 2
        kept = max(input.shape[time] - int(shift), 0)
        target = _rows.pull_forward(target, time, int(shift), ignore_index)

    if resolved == "reference" or vocab == 0:
        with torch.autocast(input.device.type, enabled=False):
            fields = reference.linear_token_statistics(
                input,
                linear_weight,
                target,
                linear_bias=linear_bias,
                ignore_index=ignore_index,
                softcap=softcap,
                logit_scale=logit_scale,
                entropy=entropy,
                argmax=argmax,
                logit_sum=logit_sum,
                log_sum_sq_probs=log_sum_sq_probs,
                top_k=top_k,
            )
        if skip_ignored and target is not None:
            ignored = target == ignore_index
            if target.dim() == input.dim():
                ignored = ignored.all(-1)
            fields = LogitStatistics._make(
                None if field is None else _zero_where(ignored, field) for field in fields
            )
    else:
        lead = input.shape[:-1]
        rows = _Rows(
            input.flatten(0, -2) if lead else input.unsqueeze(0),
            linear_weight,
            linear_bias,
            {
                "ignore_index": ignore_index,
                "softcap": 0.0 if softcap is None else float(softcap),
                "logit_scale": float(logit_scale),
                "memory_budget": budget,
                "chunk_size": chunk,
            },
            resolved,
        )
        wanted = _Wanted(skip_ignored, entropy, argmax, top_k, logit_sum)
        fields = _in_shape(rows, lead, target, wanted, log_sum_sq_probs)
    if kept is None:
        return fields
    time = input.dim() - 2
    later = (None if field is None else field.narrow(time, 0, kept) for field in fields)
    return LogitStatistics._make(later)


def _zero_where(ignored: Tensor, field: Tensor) -> Tensor:
    """Zeros for these tokens, of a field [...] or [..., K]."""
    extra = field.dim() - ignored.dim()
    return field.masked_fill(ignored.reshape(*ignored.shape, *[1] * extra), 0)


class _Wanted(NamedTuple):
    """What the op is asked for."""

    skip_ignored: bool
    entropy: bool
    argmax: bool
    top_k: int
    logit_sum: bool = False


class _Rows(NamedTuple):
    """Operands and options of the op, which knows rows."""

    input: Tensor  # [N, D]
    linear_weight: Tensor
    linear_bias: Tensor | None
    options: dict[str, Any]  # of the op, apart from what is wanted
    backend: str

    def call(self, target: Tensor | None, wanted: _Wanted) -> Sequence[Tensor]:
        """What the op returns for targets [N, K]."""
        bias = self.linear_bias
        grad = torch.is_grad_enabled()
        return statistics_ops.LIBRARIES[self.backend].linear_token_statistics_forward(
            self.input,
            self.linear_weight,
            target,
            self.linear_bias,
            **self.options,
            **wanted._asdict(),
            input_grad=grad and self.input.requires_grad,
            weight_grad=grad and self.linear_weight.requires_grad,
            bias_grad=grad and bias is not None and bias.requires_grad,
        )

    def doubled(self) -> _Rows:
        """The same with all logits twice as large: 2 c tanh(2 s u / 2 c) = 2 (c tanh(s u / c))."""
        options = dict(self.options)
        options["softcap"] *= 2
        options["logit_scale"] *= 2
        return self._replace(options=options)

    def call_on_gpu(self, target: Tensor | None, wanted: _Wanted) -> Sequence[Tensor]:
        """The same where the op knows one target and no top_k: one call per further target, and
        plain PyTorch on blocks of logits for the largest ones."""
        columns = [] if target is None else [t.contiguous() for t in target.split(1, dim=1)]
        # With several targets a token may count although the first is ignored.
        first = wanted._replace(skip_ignored=wanted.skip_ignored and len(columns) == 1, top_k=0)
        only_logprob = _Wanted(skip_ignored=True, entropy=False, argmax=False, top_k=0)
        results = list(self.call(columns[0] if columns else None, first))
        if len(columns) > 1:
            others = [self.call(column, only_logprob)[0] for column in columns[1:]]
            results[0] = torch.cat([results[0], *others], 1)
        if wanted.top_k:
            lse = results[1]
            results[6:] = _top(
                self.input, self.linear_weight, self.linear_bias, lse, self.options, wanted.top_k
            )
        return results


def _in_shape(
    rows: _Rows,
    lead: torch.Size,
    target: Tensor | None,
    wanted: _Wanted,
    log_sum_sq_probs: bool,
) -> LogitStatistics:
    """The op's results in the leading dimensions of the input."""
    several = None
    if target is not None:
        targets = target.shape[len(lead)] if target.dim() > len(lead) else 1
        several = target.reshape(len(rows.input), targets)
    on_cpu = rows.backend == "cpu"
    results = rows.call(several, wanted) if on_cpu else rows.call_on_gpu(several, wanted)
    logprob, lse, entropy, logit_sum, max_logit, argmax, top_logprobs, top_ids = results
    squares = None
    if log_sum_sq_probs:
        # log sum_v exp(2 z_v) - 2 log sum_v exp(z_v), of float64 numbers.
        lse_of_doubled = rows.doubled().call(None, _Wanted(False, False, False, 0))[1]
        squares = (lse_of_doubled - 2 * lse).to(logprob.dtype).reshape(lead)
    top = (*lead, wanted.top_k)
    return LogitStatistics(
        logprob=None if target is None else logprob.reshape(target.shape),
        lse=lse.to(logprob.dtype).reshape(lead),
        entropy=entropy.to(logprob.dtype).reshape(lead) if wanted.entropy else None,
        max_logit=max_logit.reshape(lead),
        argmax=argmax.reshape(lead) if wanted.argmax else None,
        logit_sum=logit_sum.reshape(lead) if wanted.logit_sum else None,
        mean_logit=(
            (logit_sum / len(rows.linear_weight)).reshape(lead) if wanted.logit_sum else None
        ),
        log_sum_sq_probs=squares,
        top_logprobs=top_logprobs.reshape(top) if wanted.top_k else None,
        top_ids=top_ids.reshape(top) if wanted.top_k else None,
    )


@torch.no_grad()
def _top(
    rows: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    lse: Tensor,
    options: dict[str, Any],
    top_k: int,
) -> list[Tensor]:
    """The largest log-probabilities and their classes, from blocks of logits of 64 MiB."""
    block = max(1, 2**24 // linear_weight.shape[0])
    found = []
    for begin in range(0, rows.shape[0], block):
        part = slice(begin, begin + block)
        logits = reference.compute_logits(
            rows[part],
            linear_weight,
            linear_bias,
            options["softcap"] or None,
            options["logit_scale"],
        )
        top = logits.topk(top_k)
        found.append((top.values - lse[part, None].to(logits.dtype), top.indices))
    if not found:
        return [lse.new_zeros((0, top_k)), lse.new_zeros((0, top_k), dtype=torch.int64)]
    return [torch.cat(pieces) for pieces in zip(*found, strict=True)]


def check_shapes(input: Tensor, weight: Tensor, target: Tensor | None, bias: Tensor | None) -> None:
    if input.dim() < 1 or weight.dim() != 2 or weight.shape[1] != input.shape[-1]:
        raise RuntimeError(
            f"input has shape {tuple(input.shape)} and linear_weight {tuple(weight.shape)}, "
            "expected [..., D] and [V, D]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(
            f"linear_bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}"
        )
    if target is None:
        return
    lead = input.shape[:-1]
    if target.shape[: len(lead)] != lead or target.dim() > len(lead) + 1:
        raise RuntimeError(
            f"target has shape {tuple(target.shape)}, expected {tuple(lead)} with one class index "
            f"per token of input {tuple(input.shape)}, or one dimension more with several"
        )
    if target.dtype not in _checks.INDEX_DTYPES + _checks.SMALL_INDEX_DTYPES:
        raise RuntimeError(f"target has dtype {target.dtype}, expected torch.int64 or torch.int32")
