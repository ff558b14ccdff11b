"""``linear_token_statistics`` and ``linear_logprobs``: differentiable numbers per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memeff import _positions, _rows, reference, statistics_ops
from memeff._call import Call, statistics_call
from memeff._checks import check_tensor
from memeff._options import StatisticsOptions, show_options
from memeff.statistics import LogitStatistics
from memeff.vocab_parallel import VocabParallel

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["linear_logprobs", "linear_token_statistics"]

# An op is asked for each of these by name.
_NOTHING: dict[str, Any] = {"entropy": False, "argmax": False, "logit_sum": False, "top_k": 0}


def linear_token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    entropy: bool = True,
    argmax: bool = True,
    logit_sum: bool = False,
    log_sum_sq_probs: bool = False,
    top_k: int = 0,
    skip_ignored: bool = False,
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
        linear_weight: classifier [V, D], dtype of ``input``; or [V, d1, ..., dK, D], d1 * ... * dK
            classifiers over the same rows, which run one after the other. Results have their
            dimensions after those of the tokens.
        target: class indices [..., d1, ..., dK], or with one dimension more for k per token; None
            for none.
        linear_bias: [V, d1, ..., dK], dtype of ``input``.
        ignore_index: a target that has no log-probability (it becomes 0) and no gradient; None
            means -100.
        softcap: c > 0 caps the logits: c * tanh(z / c), after ``logit_scale``.
        logit_scale: multiplies ``input @ linear_weight.T + linear_bias``; a number, or a tensor
            of shape () that may require grad, as in `linear_cross_entropy`.
        temperature: divides the logits, after ``logit_scale`` and ``softcap``: a number, or a
            tensor [...] with one per token. On GPUs the generic kernels take the latter.
        entropy, argmax: whether to compute these.
        logit_sum: whether to compute ``logit_sum`` and ``mean_logit``.
        log_sum_sq_probs: whether to compute this, in a second pass over the logits.
        top_k: number of most probable classes to return, with their log-probabilities (for
            distillation and logging; not differentiable). On the CPU it upcasts bfloat16 rows.
        skip_ignored: whether tokens whose targets are all ``ignore_index`` are left out: they cost
            nothing, whatever their hidden states hold, and all their statistics are 0.
        shift: k > 0 compares input[..., t, :] with target[..., t + k] (True: 1); the results have k
            positions fewer. A temperature belongs to the input's position.
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
            temperature=temperature,
            entropy=entropy,
            argmax=argmax,
            logit_sum=logit_sum,
            log_sum_sq_probs=log_sum_sq_probs,
            top_k=top_k,
            skip_ignored=skip_ignored,
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
    **options: Unpack[StatisticsOptions],
) -> Tensor:
    """Differentiable log-probabilities of ``target``, without storing the logits.

    The ``logprob`` of `linear_token_statistics`, and nothing else: tokens whose targets are
    all ``ignore_index`` are not computed at all.

    Args:
        input, linear_weight, target, linear_bias: as there.
        **options: ``ignore_index``, ``softcap``, ``logit_scale``, ``temperature``, ``shift``,
            ``memory_budget``, ``chunk_size``, ``vocab_parallel`` and ``backend``, as there.

    Returns:
        log p in the shape of ``target`` (with ``shift``, shorter), float32 or float64; 0 where the
        target is ``ignore_index``.
    """
    for name in options:
        if name not in StatisticsOptions.__annotations__:
            raise TypeError(f"linear_logprobs got an unexpected keyword argument {name!r}")
    statistics = linear_token_statistics(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        entropy=False,
        argmax=False,
        skip_ignored=True,
        **options,
    )
    if statistics.logprob is None:  # not before, or ranks that have a target would wait
        check_tensor("target", target)
    assert statistics.logprob is not None
    return statistics.logprob


show_options(linear_logprobs, StatisticsOptions.__annotations__, of=linear_token_statistics)


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

    fields = _of_reference(call) if call.needs_reference() else _of_rows(call)
    if kept is None:
        return fields
    time = input.dim() - 2
    later = (None if field is None else field.narrow(time, 0, kept) for field in fields)
    return LogitStatistics._make(later)


def _of_reference(call: Call) -> LogitStatistics:
    input, target, options = call.input, call.target, call.options
    if not options.skip_ignored or target is None:
        result: LogitStatistics = call.of_reference(reference.linear_token_statistics)
        return result
    ignored = target == options.ignore_index
    if target.dim() > input.dim() + call.linear_weight.dim() - 3:  # several per token
        ignored = ignored.all(-1)
    # What they hold is not looked at, in no position.
    left_out = ignored.flatten(input.dim() - 1).all(-1) if call.linear_weight.dim() > 2 else ignored
    call = call._replace(input=input.masked_fill(left_out[..., None], 0))
    if call.temperature is not None:
        call = call._replace(temperature=call.temperature.masked_fill(left_out, 1))
    fields: LogitStatistics = call.of_reference(reference.linear_token_statistics)
    return LogitStatistics._make(
        None if field is None else _zero_where(ignored, field) for field in fields
    )


def _zero_where(ignored: Tensor, field: Tensor) -> Tensor:
    """Zeros for these tokens, of a field [...] or [..., K]."""
    extra = field.dim() - ignored.dim()
    return field.masked_fill(ignored.reshape(*ignored.shape, *[1] * extra), 0)


def _of_rows(call: Call) -> LogitStatistics:
    """Statistics that the op computes, which knows rows, in the leading dimensions of the input."""
    lead, positions = call.input.shape[:-1], call.linear_weight.shape[1:-1]
    call = call.of_rows()
    if positions:
        parts = [_of_position(one) for one in _positions.split(call)]
        fields = LogitStatistics._make(map(_stacked, zip(*parts, strict=True)))
    else:
        fields = _of_position(call)
    of_row = 2 if positions else 1
    return LogitStatistics._make(
        None if field is None else field.reshape((*lead, *positions, *field.shape[of_row:]))
        for field in fields
    )


def _stacked(fields: tuple[Tensor | None, ...]) -> Tensor | None:
    """A field [N, ...] of each position as one [N, P, ...]."""
    given = [field for field in fields if field is not None]
    return torch.stack(given, 1) if given else None


def _of_position(call: Call) -> LogitStatistics:
    """Fields [N] or [N, k] for input [N, D], linear_weight [V, D], and target [N] or [N, k]."""
    target, options = call.target, call.options
    if target is not None and target.dim() == 1:
        call = call._replace(target=target.unsqueeze(1))
    compute = _call_op if call.backend == "cpu" else _call_on_gpu
    logprob, lse, entropy, logit_sum, max_logit, argmax, top_logprobs, top_ids = compute(call)
    squares = mean_logit = None
    if options.logit_sum:
        mean_logit = logit_sum / call.count_classes()
    if options.log_sum_sq_probs:
        # log sum_v exp(2 z_v) - 2 log sum_v exp(z_v), of float64 numbers.
        squares = (_call_op(_doubled(call))[1] - 2 * lse).to(logprob.dtype)
    return LogitStatistics(
        logprob=None if target is None else logprob.reshape(target.shape),
        lse=lse.to(logprob.dtype),
        entropy=entropy.to(logprob.dtype) if options.entropy else None,
        max_logit=max_logit,
        argmax=argmax if options.argmax else None,
        logit_sum=logit_sum if options.logit_sum else None,
        mean_logit=mean_logit,
        log_sum_sq_probs=squares,
        top_logprobs=top_logprobs if options.top_k else None,
        top_ids=top_ids if options.top_k else None,
    )


def _doubled(call: Call) -> Call:
    """lse alone, of logits twice as large: 2 c tanh(2 s u / 2 c) = 2 (c tanh(s u / c))."""
    options = call.options._replace(
        softcap=2 * call.options.softcap, logit_scale=2 * call.options.logit_scale, **_NOTHING
    )
    if call.backend == "cpu" and call.options.top_k:
        # It decides which kernels compute the scores, and with what budget.
        options = options._replace(top_k=1)
    return call._replace(target=_leading_target(call), options=options)


def _leading_target(call: Call) -> Tensor | None:
    """[N, 1] the first target of each token that is not ignored, which says whether it is left
    out; None where no token is."""
    if call.target is None or not call.options.skip_ignored:
        return None
    first = (call.target != call.options.ignore_index).int().argmax(1, keepdim=True)
    return call.target.gather(1, first)


def _call_op(call: Call) -> Sequence[Tensor]:
    """What the op returns for input [N, D] and target [N, k]."""
    library = statistics_ops.LIBRARIES[call.backend]
    return library.linear_token_statistics_forward(
        call.input,
        call.linear_weight,
        call.target,
        call.linear_bias,
        call.scale_number(),
        call.temperature,
        **call.keywords(library.statistics_options),
    )


def _call_on_gpu(call: Call) -> Sequence[Tensor]:
    """The same where the op knows one target and no top_k: one call per further target, and plain
    PyTorch on blocks of logits for the largest ones."""
    options, target = call.options, call.target
    if options.top_k and options.vocab_parallel is not None:
        _check_top_of_ranks(call)
    columns: list[Tensor | None] = [None]
    if target is not None:
        columns = [t.contiguous() for t in target.split(1, dim=1)] or columns
    leading = columns[0] if len(columns) == 1 else _leading_target(call)
    first = call._replace(
        target=columns[0] if leading is None else leading, options=options._replace(top_k=0)
    )
    results = list(_call_op(first))
    if len(columns) > 1:
        assert target is not None
        if leading is not None:  # another target than the first where that is ignored
            results[0] = results[0].masked_fill(target[:, :1] == options.ignore_index, 0)
        only_logprob = options._replace(skip_ignored=True, **_NOTHING)
        others = [
            _call_op(call._replace(target=column, options=only_logprob))[0]
            for column in columns[1:]
        ]
        results[0] = torch.cat([results[0], *others], 1)
    if options.top_k:
        top = _top(call, results[1])
        if leading is not None and options.skip_ignored:
            top = [field.masked_fill(leading == options.ignore_index, 0) for field in top]
        results[6:] = top
    return results


def _check_top_of_ranks(call: Call) -> None:
    """As the operator's own check, which knows no ``top_k`` here. The ranks agree: if there are not
    so many classes in all, no rank has as many. Only then the host waits for their number; compiled
    code does not, and gets -inf and the class -1 for what does not exist."""
    classes = call.count_classes()
    own, top_k = len(call.linear_weight), call.options.top_k
    if top_k > own and not torch.compiler.is_compiling() and top_k > int(classes):
        raise ValueError(f"top_k={top_k}: expected a number of classes in [0, {int(classes)}]")


@torch.no_grad()
def _top(call: Call, lse: Tensor) -> list[Tensor]:
    """The largest log-probabilities and their classes, from blocks of logits of 64 MiB."""
    top_k, vocab = call.options.top_k, call.linear_weight.shape[0]
    block = max(1, 2**24 // max(1, vocab))
    scale: Any = call.options.logit_scale
    scale = scale if call.scale is None else scale * call.scale
    found = []
    for begin in range(0, call.input.shape[0], block):
        part = slice(begin, begin + block)
        logits = reference.compute_logits(
            call.input[part],
            call.linear_weight,
            call.linear_bias,
            call.options.softcap,
            scale,
            None if call.temperature is None else call.temperature[part],
        )
        top = logits.topk(min(top_k, vocab))
        found.append((top.values - lse[part, None].to(logits.dtype), top.indices))
    if not found:
        return [lse.new_zeros((0, top_k)), lse.new_zeros((0, top_k), dtype=torch.int64)]
    values, ids = (torch.cat(pieces) for pieces in zip(*found, strict=True))
    shared = call.options.vocab_parallel
    return [values, ids] if shared is None else [*_top_of_ranks(call, shared, values, ids)]


def _top_of_ranks(
    call: Call, shared: VocabParallel, values: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """The largest of those that each rank has found among its own classes."""
    top_k = call.options.top_k
    first = shared.first_class(len(call.linear_weight), ids.device)
    missing = (0, top_k - values.shape[1])
    values = torch.nn.functional.pad(values, missing, value=-torch.inf)
    ids = torch.nn.functional.pad(ids + first, missing, value=-1)
    top = shared.gather(values).movedim(0, 1).flatten(1).topk(top_k)
    return top.values, shared.gather(ids).movedim(0, 1).flatten(1).gather(1, top.indices)
