"""``linear_token_statistics`` and ``linear_logprobs``: differentiable numbers per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memeff import _rows, reference, statistics_ops
from memeff._call import Call, statistics_call
from memeff._checks import check_number, check_tensor
from memeff._rank_statistics import statistics_of_ranks, top_of_ranks
from memeff.statistics import LogitStatistics
from memeff.vocab_parallel import VocabParallel

__all__ = ["linear_logprobs", "linear_token_statistics"]

# Of what an op may be asked for.
_NOTHING: dict[str, Any] = {"entropy": False, "argmax": False, "logit_sum": False, "top_k": 0}


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
    vocab_parallel: VocabParallel | None = None,
    backend: str = "auto",
) -> LogitStatistics:
    """Statistics of every row of ``input @ linear_weight.T + linear_bias``, without those logits.

    Log-probability of the target, log-sum-exp, entropy, the sum of the logits and that of squared
    probabilities are differentiable with respect to ``input``, ``linear_weight`` and
    ``linear_bias``, with any upstream gradients. The forward pass keeps a few numbers per token;
    the backward pass computes the logits again, block by block. Tokens without an upstream gradient
    (masked ones) cost it nothing.

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
        vocab_parallel: as in `linear_cross_entropy`; classes are numbered among all ranks'.
        backend: "cpu", "cuda", "reference" (plain PyTorch, stores the logits), or "auto".

    Returns:
        `memeff.LogitStatistics`. Second derivatives raise an error.

    Raises:
        TypeError, ValueError, RuntimeError: an argument of the wrong type, with a bad value, or
            whose shape, dtype or device does not fit.
        IndexError: a target outside [0, V) that is not ``ignore_index`` (on the CPU).
    """
    return compute_statistics(
        statistics_call(
            input,
            linear_weight,
            target,
            linear_bias,
            ignore_index=ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            entropy=entropy,
            argmax=argmax,
            logit_sum=logit_sum,
            log_sum_sq_probs=log_sum_sq_probs,
            top_k=top_k,
            shift=shift,
            memory_budget=memory_budget,
            chunk_size=chunk_size,
            vocab_parallel=vocab_parallel,
            backend=backend,
        )
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
    vocab_parallel: VocabParallel | None = None,
    backend: str = "auto",
) -> Tensor:
    """Differentiable log-probabilities of ``target``, without storing the logits.

    The ``logprob`` of `linear_token_statistics`, and nothing else: tokens whose targets are
    all ``ignore_index`` are not computed at all. Arguments as there, and

    Args:
        temperature: divides the logits, after ``logit_scale`` and ``softcap``.

    Returns:
        log p in the shape of ``target`` (with ``shift``, shorter), float32 or float64; 0 where the
        target is ``ignore_index``.
    """
    check_number("temperature", temperature)
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, expected a finite value > 0")
    check_tensor("target", target)
    call = statistics_call(
        input,
        linear_weight,
        target,
        linear_bias,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        skip_ignored=True,
        shift=shift,
        memory_budget=memory_budget,
        chunk_size=chunk_size,
        vocab_parallel=vocab_parallel,
        backend=backend,
    )
    # (c / T) tanh((z / T) / (c / T)) = c tanh(z / c) / T
    options = call.options._replace(
        softcap=call.options.softcap / temperature,
        logit_scale=call.options.logit_scale / temperature,
    )
    statistics = compute_statistics(call._replace(options=options))
    assert statistics.logprob is not None
    return statistics.logprob


def compute_statistics(call: Call) -> LogitStatistics:
    """Statistics in the leading dimensions of the input."""
    input, target, options = call.input, call.target, call.options
    kept = None
    if options.shift:
        assert target is not None
        time = input.dim() - 2
        kept = max(input.shape[time] - options.shift, 0)
        target = _rows.pull_forward(target, time, options.shift, options.ignore_index)
        call = call._replace(target=target)

    if call.needs_reference:
        fields: LogitStatistics = call.of_reference(reference.linear_token_statistics)
        if options.skip_ignored and target is not None:
            ignored = target == options.ignore_index
            if target.dim() == input.dim():
                ignored = ignored.all(-1)
            fields = LogitStatistics._make(
                None if field is None else _zero_where(ignored, field) for field in fields
            )
    else:
        fields = _of_rows(call)
    if kept is None:
        return fields
    time = input.dim() - 2
    later = (None if field is None else field.narrow(time, 0, kept) for field in fields)
    return LogitStatistics._make(later)


def _zero_where(ignored: Tensor, field: Tensor) -> Tensor:
    """Zeros for these tokens, of a field [...] or [..., K]."""
    extra = field.dim() - ignored.dim()
    return field.masked_fill(ignored.reshape(*ignored.shape, *[1] * extra), 0)


def _of_rows(call: Call) -> LogitStatistics:
    """The op's results, which knows rows, in the leading dimensions of the input."""
    input, target, options = call.input, call.target, call.options
    lead = input.shape[:-1]
    rows = input.flatten(0, -2) if lead else input.unsqueeze(0)
    several = None
    if target is not None:
        targets = target.shape[len(lead)] if target.dim() > len(lead) else 1
        several = target.reshape(len(rows), targets)
    compute = _call_op if call.backend == "cpu" else _call_on_gpu
    call = call._replace(input=rows, target=several)
    logprob, lse, entropy, logit_sum, max_logit, argmax, top_logprobs, top_ids = compute(call)
    squares = mean_logit = None
    if options.logit_sum:
        mean_logit = (logit_sum / call.count_classes()).reshape(lead)
    if options.log_sum_sq_probs:
        # log sum_v exp(2 z_v) - 2 log sum_v exp(z_v), of float64 numbers.
        squares = (_call_op(_doubled(call))[1] - 2 * lse).to(logprob.dtype).reshape(lead)
    top = (*lead, options.top_k)
    return LogitStatistics(
        logprob=None if target is None else logprob.reshape(target.shape),
        lse=lse.to(logprob.dtype).reshape(lead),
        entropy=entropy.to(logprob.dtype).reshape(lead) if options.entropy else None,
        max_logit=max_logit.reshape(lead),
        argmax=argmax.reshape(lead) if options.argmax else None,
        logit_sum=logit_sum.reshape(lead) if options.logit_sum else None,
        mean_logit=mean_logit,
        log_sum_sq_probs=squares,
        top_logprobs=top_logprobs.reshape(top) if options.top_k else None,
        top_ids=top_ids.reshape(top) if options.top_k else None,
    )


def _doubled(call: Call) -> Call:
    """lse alone, of logits twice as large: 2 c tanh(2 s u / 2 c) = 2 (c tanh(s u / c))."""
    options = call.options._replace(
        softcap=2 * call.options.softcap,
        logit_scale=2 * call.options.logit_scale,
        skip_ignored=False,
        **_NOTHING,
    )
    if call.backend == "cpu" and call.options.top_k:
        # It decides which kernels compute the scores, and with what budget.
        options = options._replace(top_k=1)
    return call._replace(target=None, options=options)


def _call_op(call: Call) -> Sequence[Tensor]:
    """What the op returns for input [N, D] and target [N, K]."""
    if call.merges_ranks:
        return statistics_of_ranks(call)
    library = statistics_ops.LIBRARIES[call.backend]
    return library.linear_token_statistics_forward(
        call.input,
        call.linear_weight,
        call.target,
        call.linear_bias,
        **call.keywords(library.statistics_options),
    )


def _call_on_gpu(call: Call) -> Sequence[Tensor]:
    """The same where the op knows one target and no top_k: one call per further target, and plain
    PyTorch on blocks of logits for the largest ones."""
    options = call.options
    columns: list[Tensor | None] = [None]
    if call.target is not None:
        columns = [t.contiguous() for t in call.target.split(1, dim=1)] or columns
    # With several targets a token may count although the first is ignored.
    skip = options.skip_ignored and len(columns) == 1 and columns[0] is not None
    first = options._replace(skip_ignored=skip, top_k=0)
    only_logprob = options._replace(skip_ignored=True, **_NOTHING)
    results = list(_call_op(call._replace(target=columns[0], options=first)))
    if len(columns) > 1:
        others = [
            _call_op(call._replace(target=column, options=only_logprob))[0]
            for column in columns[1:]
        ]
        results[0] = torch.cat([results[0], *others], 1)
    if options.top_k:
        results[6:] = _top(call, results[1])
    return results


@torch.no_grad()
def _top(call: Call, lse: Tensor) -> list[Tensor]:
    """The largest log-probabilities and their classes, from blocks of logits of 64 MiB."""
    top_k, vocab = call.options.top_k, call.linear_weight.shape[0]
    block = max(1, 2**24 // max(1, vocab))
    found = []
    for begin in range(0, call.input.shape[0], block):
        part = slice(begin, begin + block)
        logits = reference.compute_logits(
            call.input[part],
            call.linear_weight,
            call.linear_bias,
            call.options.softcap,
            call.options.logit_scale,
        )
        top = logits.topk(min(top_k, vocab))
        found.append((top.values - lse[part, None].to(logits.dtype), top.indices))
    if not found:
        return [lse.new_zeros((0, top_k)), lse.new_zeros((0, top_k), dtype=torch.int64)]
    values, ids = (torch.cat(pieces) for pieces in zip(*found, strict=True))
    return [*top_of_ranks(call, values, ids)] if call.merges_ranks else [values, ids]
