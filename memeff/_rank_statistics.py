"""A vocabulary that ranks share where kernels know one process only: on GPUs.

Each rank computes statistics of its own classes; one all-gather of a few numbers per token makes
those of all classes of them; and the backward operator gets these in place of the rank's own, so
that its softmax is that of all classes:

    lse = log sum_r exp lse_r,   entropy = sum_r p_r (entropy_r - log p_r),  p_r = exp(lse_r - lse)
    dz_v = p_v (grad_lse - grad_logprob - ...) + grad_logprob [v is the target]

A target of another rank's is none for this one's operator, and its grad_logprob goes into grad_lse.
Sums go through the ranks in their order, so that every rank gets the same bits. Scores are computed
twice, 8 N D V / R FLOPs; the gradient of ``input`` is rounded to its dtype on each rank before the
sum over the ranks. Nothing here waits for the device, and nothing compares what the ranks pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memeff import ops, statistics_ops
from memeff._call import Call, RowResults
from memeff._gradients import first_derivatives_only, outside_of_graphs

__all__ = ["loss_of_ranks", "statistics_of_ranks", "top_of_ranks"]

_NO_TARGET = -100  # of this rank's classes, whose numbers are >= 0


def statistics_of_ranks(call: Call) -> Sequence[Tensor]:
    """What the op of token statistics returns, for input [N, D] and target [N, 1] or None."""
    operands = (call.input, call.linear_weight, call.linear_bias)
    return outside_of_graphs(_OfRanks.apply)(*operands, call.target, call)


def _own(call: Call, target: Tensor | None) -> Call:
    """The call as one process would make it, with this rank's numbers of classes."""
    options = call.options._replace(
        vocab_parallel=None, ignore_index=_NO_TARGET, skip_ignored=False, top_k=0
    )
    return call._replace(target=target, options=options)


def _first_class(call: Call) -> int | Tensor:
    shared = call.options.vocab_parallel
    assert shared is not None
    if shared.start is not None:
        return shared.start
    own = torch.full((), len(call.linear_weight), dtype=torch.int64, device=call.input.device)
    sizes = shared.gather(own)
    return sizes[: shared.rank].sum()


class _OfRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, ...]:
        options, shared = call.options, call.options.vocab_parallel
        assert shared is not None
        call = call._replace(input=input, linear_weight=linear_weight, linear_bias=linear_bias)
        first = _first_class(call)
        own_target = here = ignored = None
        if target is not None:
            ignored = target == options.ignore_index
            own_target = target - first
            here = (own_target >= 0) & (own_target < len(linear_weight)) & ~ignored
            own_target = own_target.where(here, _NO_TARGET)
        found = _statistics(_own(call, own_target))
        logprob, lse, entropy, logit_sum, maximum, argmax = found[:6]
        numbers = [lse, maximum]
        if here is not None:  # the target's logit, of the rank that has it
            numbers.append(torch.where(here, logprob + lse[:, None], 0).squeeze(1))
        numbers += [entropy] if options.entropy else []
        numbers += [logit_sum] if options.logit_sum else []
        numbers += [argmax + first] if options.argmax else []
        of_ranks = shared.gather(torch.stack([n.double() for n in numbers]))  # [R, numbers, N]
        merged = iter(of_ranks.unbind(1))

        lses = next(merged)
        lse = torch.logsumexp(lses, 0)
        maxima = next(merged)
        largest = maxima.amax(0)
        if here is not None and ignored is not None:
            value = next(merged).sum(0) - lse
            logprob = value.to(logprob.dtype)[:, None].masked_fill(ignored, 0)
        if options.entropy:
            log_share = lses - lse
            share = log_share.exp()
            terms = torch.where(share > 0, share * (next(merged) - log_share), 0)
            entropy = terms.sum(0).masked_fill(~lse.isfinite(), torch.nan)
        if options.logit_sum:
            logit_sum = next(merged).sum(0).to(logit_sum.dtype)
        if options.argmax:  # the first of equal ones
            ids = next(merged)
            argmax = ids.where(maxima == largest, torch.inf).amin(0).nan_to_num(posinf=0).long()
        if options.skip_ignored and ignored is not None:
            lse, entropy, logit_sum, largest, argmax = (
                n.masked_fill(ignored.squeeze(1), 0) if len(n) else n
                for n in (lse, entropy, logit_sum, largest, argmax)
            )
        ctx.call = call
        ctx.save_for_backward(
            lse, entropy, input, linear_weight, own_target, linear_bias, here, ignored
        )
        largest = largest.to(maximum.dtype)
        ctx.mark_non_differentiable(largest, argmax, *found[6:])
        ctx.set_materialize_grads(False)
        return logprob, lse, entropy, logit_sum, largest, argmax, *found[6:]

    @staticmethod
    @first_derivatives_only
    def backward(
        ctx: Any,
        grad_logprob: Tensor | None,
        grad_lse: Tensor | None,
        grad_entropy: Tensor | None,
        grad_logit_sum: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        lse, entropy, *operands, here, ignored = ctx.saved_tensors
        call, shared = ctx.call, ctx.call.options.vocab_parallel
        if call.options.skip_ignored and ignored is not None:
            none = ignored.squeeze(1)
            grad_lse, grad_entropy, grad_logit_sum = (
                None if g is None else g.masked_fill(none, 0)
                for g in (grad_lse, grad_entropy, grad_logit_sum)
            )
        if grad_logprob is not None and here is not None:
            counted = grad_logprob.double().masked_fill(ignored, 0)
            elsewhere = counted.masked_fill(here, 0).squeeze(1)
            grad_lse = -elsewhere if grad_lse is None else grad_lse - elsewhere
            grad_logprob = counted.masked_fill(~here, 0)
        upstream = grad_logprob, grad_lse, grad_entropy, grad_logit_sum
        wanted = ctx.needs_input_grad[:3]
        gradients = _gradients(_own(call, None), wanted, *upstream, lse, entropy, *operands)
        found = [g if want else None for g, want in zip(gradients, wanted, strict=True)]
        if found[0] is not None and shared.reduce_input_grad:
            dtype = shared.reduce_dtype or torch.promote_types(found[0].dtype, torch.float32)
            found[0] = shared.add_up(found[0].to(dtype)).to(found[0].dtype)
        return *found, None, None


def _statistics(call: Call) -> Sequence[Tensor]:
    """Those of one rank's classes, of which there may be none."""
    library, input, target = statistics_ops.LIBRARIES[call.backend], call.input, call.target
    options = call.keywords(library.statistics_options)
    operands = (
        input, call.linear_weight, target, call.linear_bias, call.scale_number, call.temperature
    )  # fmt: skip
    if len(call.linear_weight) > 0:
        return library.linear_token_statistics_forward(*operands, **options)
    nothing = statistics_ops.empty_statistics(*operands, **options)
    values = (0, -torch.inf, 0, 0, -torch.inf, 0, 0, 0)
    return [n.fill_(value) for n, value in zip(nothing, values, strict=True)]


def _gradients(call: Call, wanted: Sequence[bool], *tensors: Any) -> Sequence[Tensor]:
    *_, input, linear_weight, _, linear_bias = tensors
    flags = dict(zip(("input_grad", "weight_grad", "bias_grad"), wanted, strict=True))
    if len(linear_weight) > 0:
        library = statistics_ops.LIBRARIES[call.backend]
        options = call.keywords(library.backward_options) | flags
        return library.linear_token_statistics_backward(
            *tensors, call.scale_number, call.temperature, **options
        )
    nothing = ops.gradients_like(input, linear_weight, linear_bias, tuple(wanted))
    return [gradient.zero_() for gradient in nothing]


def loss_of_ranks(call: Call) -> RowResults:
    """What the op of the loss returns, from statistics of rows with one class index each."""
    options, target = call.options, call.target
    assert target is not None
    wanted = options._replace(
        entropy=options.return_statistics,
        argmax=options.return_statistics,
        logit_sum=options.label_smoothing > 0,
        skip_ignored=True,
    )
    found = statistics_of_ranks(call._replace(target=target[:, None], options=wanted))
    logprob, lse, entropy, logit_sum, max_logit, argmax = found[:6]
    dtype, ignored = logprob.dtype, target == options.ignore_index
    losses = -logprob.squeeze(1).double()
    if options.label_smoothing > 0:
        mean = logit_sum.double() / call.count_classes()
        losses = (1 - options.label_smoothing) * losses + options.label_smoothing * (lse - mean)
    if options.z_loss > 0:
        losses = losses + options.z_loss * lse.square()
    if call.token_weight is not None:
        losses = losses * call.token_weight.double()
    losses = losses.masked_fill(ignored, 0)

    statistics, loss = losses.new_empty(0, dtype=dtype), losses
    if options.return_statistics:
        target_logit = logprob.squeeze(1) + lse
        rows = (losses, target_logit.masked_fill(ignored, 0), entropy, max_logit)
        statistics = torch.stack([row.detach().to(dtype) for row in rows])
    if options.reduction != "none":
        loss = losses.sum()
    if options.reduction == "mean":
        loss = loss / ((~ignored).sum() if call.num_items is None else call.num_items)
    return RowResults(loss.to(dtype), lse.detach(), statistics, argmax)


def top_of_ranks(call: Call, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The ``top_k`` largest [N, top_k] of those [N, n] that each rank has found among its own."""
    shared, top_k = call.options.vocab_parallel, call.options.top_k
    assert shared is not None
    missing = (0, top_k - values.shape[1])
    values = torch.nn.functional.pad(values, missing, value=-torch.inf)
    ids = torch.nn.functional.pad(ids + _first_class(call), missing)
    of_ranks = shared.gather(values).movedim(0, 1).flatten(1)
    top = of_ranks.topk(top_k)
    return top.values, shared.gather(ids).movedim(0, 1).flatten(1).gather(1, top.indices)
