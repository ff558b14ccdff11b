"""The operator torch.ops.memeff.linear_distillation: loss and gradients, chunk by chunk of tokens.

With u the student's logits over the temperature, p = softmax(u), and r_v = log p_v - log m_v
(reverse KL: log p_v - log q_v), 0 where p_v = 0, the gradients of a token's loss are

    forward KL    p - q
    reverse KL    p_v (r_v - sum_w p_w r_w)
    else          (1 - beta) p_v (r_v - sum_w p_w r_w)

written out rather than left to autograd: they are finite where a class is impossible, and take a
handful of blocks [c, V] instead of one per operation. An operator, so that compiled code has one
node for what loops over chunks.

Where ranks share the vocabulary each has a part of every row of logits: they exchange maxima and
sums of exponentials, then the sums over the classes above, a few numbers per token each.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memeff import _flops, ops
from memeff._gradient_sums import GradientSum, row_slices
from memeff._gradients import first_derivatives_only, is_last_backward
from memeff._heads import BLOCKS_PER_CHUNK, Head, choose_chunk_size
from memeff.losses.operator_autograd import call, check_flags, function_of
from memeff.vocab_parallel import VocabParallel, add_up, agree, gather

__all__ = ["Distillation", "Side", "Transform", "distill"]

Side = tuple[Tensor, Tensor, Tensor | None]  # rows [N, D], weight [V, D], bias [V]

# Without a budget: as many tokens as pay for passing over both weights, while their blocks of
# logits take no more than this.
_ENOUGH_TOKENS, _MOST_BYTES = 256, 2**28


class Transform(NamedTuple):
    """What happens to the logits of a side: softcap * tanh(logit_scale * z / softcap)."""

    softcap: float  # 0: none
    logit_scale: float


class Distillation(NamedTuple):
    """The scalar arguments, checked."""

    beta: float
    temperature: float
    student: Transform
    teacher: Transform
    chunk_size: int  # tokens, 0: ours to choose
    memory_budget: int  # bytes, -1: none given
    vocab_parallel: VocabParallel | None


class Ranks(NamedTuple):
    """The ranks that share the vocabulary, or this process alone."""

    group: str  # "": alone
    size: int

    def total(self, part: Tensor) -> Tensor:
        """The sum of the ranks' parts, in their order: the same bits on all of them."""
        return gather(part, self.group, self.size).sum(0) if self.group else part

    def log_softmax_(self, logits: Tensor) -> Tensor:
        """log softmax over the classes of all ranks; ``logits`` may be overwritten."""
        if not self.group:
            return logits.log_softmax(-1)
        own = logits.amax(-1) if logits.shape[1] else logits.new_full((len(logits),), -torch.inf)
        sums = (logits - own.masked_fill(own == -torch.inf, 0)[:, None]).exp_().sum(-1)
        maxima, sums = gather(torch.stack([own, sums]), self.group, self.size).unbind(1)
        largest = maxima.amax(0)
        total = (sums * (maxima - largest).exp()).sum(0)
        return logits.sub_(largest[:, None]).sub_(total.log()[:, None])


def distill(
    student: Side,
    teacher: Side,
    counted: Tensor | None,
    divisor: Tensor | float,
    settings: Distillation,
) -> Tensor:
    """Sum of the divergences of the tokens that count [N] (None: all), over ``divisor``."""
    dtype = torch.promote_types(student[0].dtype, torch.float32)
    if not isinstance(divisor, Tensor):
        divisor = torch.full((), divisor, dtype=torch.float64, device=student[0].device)
    scale = divisor.to(torch.float64).reciprocal().to(dtype)
    grad = torch.is_grad_enabled()
    wanted = [grad and t is not None and t.requires_grad for t in student]
    tensors = (*student, *(None if t is None else t.detach() for t in teacher), counted, scale)
    student_softcap, student_logit_scale = settings.student
    teacher_softcap, teacher_logit_scale = settings.teacher
    # float16 gradients are computed when the upstream gradient, a loss scale, is known.
    input_grad, weight_grad, bias_grad = (
        want and student[0].dtype != torch.float16 for want in wanted
    )
    shared = settings.vocab_parallel
    options = {
        "beta": settings.beta,
        "temperature": settings.temperature,
        "student_softcap": student_softcap,
        "student_logit_scale": student_logit_scale,
        "teacher_softcap": teacher_softcap,
        "teacher_logit_scale": teacher_logit_scale,
        "chunk_size": settings.chunk_size,
        "memory_budget": settings.memory_budget,
        "vocab_group": "" if shared is None else shared.group_name,
        "ranks": 1 if shared is None else shared.ranks,
        "reduce_input_grad": shared is not None and shared.reduce_input_grad,
        "reduce_dtype": None if shared is None else shared.reduce_dtype,
        "input_grad": input_grad,
        "weight_grad": weight_grad,
        "bias_grad": bias_grad,
    }
    loss: Tensor = call(_OP, _FUNCTION, tensors, options)[0]
    return loss


def _linear_distillation(
    student_input: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    counted: Tensor | None,
    scale: Tensor,
    *,
    beta: float,
    temperature: float,
    student_softcap: float,
    student_logit_scale: float,
    teacher_softcap: float,
    teacher_logit_scale: float,
    chunk_size: int,
    memory_budget: int,
    vocab_group: str,
    ranks: int,
    reduce_input_grad: bool,
    reduce_dtype: torch.dtype | None,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients, both times ``scale``; of no elements where one is not wanted."""
    dtype = torch.promote_types(student_input.dtype, torch.float32)
    student = Head(
        student_weight,
        student_bias,
        upcast=True,
        weight_grad=student_weight.dtype if weight_grad else None,
        bias_grad=student_weight.dtype if bias_grad else None,
    )
    teacher = Head(teacher_weight, teacher_bias, upcast=True)
    grad_input = None
    if input_grad:
        grad_input = GradientSum(student_input.shape, student_input.dtype, student_input.device)
    any_grad = input_grad or student.wants_gradient
    group = Ranks(vocab_group, ranks)

    positions = torch.arange(len(student_input), device=student_input.device)
    if counted is not None:
        positions = positions[counted]
    planned = student_weight
    if vocab_group:
        facts = {
            "student_input": _described(student_input),
            "teacher_input": _described(teacher_input),
            "student_bias": _described(student_bias),
            "teacher_bias": _described(teacher_bias),
            "beta": beta,
            "temperature": temperature,
            "student_softcap": student_softcap,
            "student_logit_scale": student_logit_scale,
            "teacher_softcap": teacher_softcap,
            "teacher_logit_scale": teacher_logit_scale,
            "chunk_size": chunk_size,
            "reduce_input_grad": reduce_input_grad,
            "reduce_dtype": reduce_dtype,
            "gradients": (input_grad, weight_grad, bias_grad),
            "mask": f"{len(positions)} tokens whose positions add up to {int(positions.sum())}",
            "1 / num_items": float(scale),
        }
        planned, memory_budget = _agree(group, facts, student_weight, memory_budget)
    size = _chunk_size(len(positions), planned, dtype.itemsize, chunk_size, memory_budget)
    total = torch.zeros((), dtype=torch.float64, device=student_input.device)
    for chunk in positions.split(size):
        rows = student_input[chunk]
        log_q, _ = _log_softmax(
            teacher.logits(teacher_input[chunk]).to(dtype),
            (teacher_softcap, teacher_logit_scale, temperature),
            False,
            group,
        )
        log_p, slope = _log_softmax(
            student.logits(rows),
            (student_softcap, student_logit_scale, temperature),
            any_grad,
            group,
        )
        losses, gradient = _divergence(log_p, log_q, beta, any_grad, group)
        del log_p, log_q
        total += losses.sum(dtype=torch.float64)
        if gradient is None:
            continue
        gradient *= student_logit_scale / temperature
        if slope is not None:
            gradient *= slope
        grad_rows = student.add_gradients(gradient, rows, input_grad)
        if grad_input is not None and grad_rows is not None:
            if reduce_input_grad:
                reduced = add_up(grad_rows.to(reduce_dtype or dtype), vocab_group)
                grad_rows = reduced.to(dtype)
            grad_input.write(chunk, grad_rows)
    sums = grad_input, *student.take_gradients()
    gradients = [
        student_input.new_empty(0) if s is None else s.times(scale, last=True) for s in sums
    ]
    return total.to(dtype) * scale, gradients[0], gradients[1], gradients[2]


def _described(tensor: Tensor | None) -> str | None:
    """What ranks must have in common of it: all but the number of classes of a bias."""
    if tensor is None:
        return None
    shape = list(tensor.shape) if tensor.dim() > 1 else ""
    return f"{shape}{tensor.dtype}"


def _agree(
    group: Ranks, facts: dict[str, Any], weight: Tensor, memory_budget: int
) -> tuple[Tensor, int]:
    """So that all ranks have the same chunks: a weight of the shape of the largest one of any rank,
    and the smallest budget. An error on every rank if they are about to compute other things."""
    rows, budget = agree(group.group, facts, len(weight), memory_budget)
    return torch.empty((rows, weight.shape[1]), dtype=weight.dtype, device="meta"), budget


def _chunk_size(tokens: int, weight: Tensor, itemsize: int, chunk_size: int, budget: int) -> int:
    of_both = 2 * itemsize
    size = choose_chunk_size(tokens, weight, of_both, chunk_size, budget)
    if chunk_size > 0 or budget >= 0:
        return size
    affordable = _MOST_BYTES // (BLOCKS_PER_CHUNK * of_both * max(len(weight), 1))
    return max(size, min(_ENOUGH_TOKENS, affordable))


def _log_softmax(
    logits: Tensor, transform: tuple[float, float, float], slope: bool, group: Ranks
) -> tuple[Tensor, Tensor | None]:
    """log softmax of softcap * tanh(scale * z / softcap) / temperature, and if asked for the
    derivative of the cap. ``logits`` are overwritten."""
    softcap, scale, temperature = transform
    logits *= scale
    derivative = None
    if softcap:
        logits /= softcap
        if slope:
            # 1 - tanh(u)^2, which has no digits left where tanh is nearly 1
            decay = logits.abs().mul_(-2).exp_()
            derivative = decay.mul(4).div_(decay.add_(1).square_())
        logits.tanh_().mul_(softcap)
    logits /= temperature
    return group.log_softmax_(logits), derivative


def _divergence(
    log_p: Tensor, log_q: Tensor, beta: float, wants_gradient: bool, group: Ranks
) -> tuple[Tensor, Tensor | None]:
    """[c] and its gradient with respect to the student's logits over the temperature [c, V].

    ``log_p`` and ``log_q`` [c, V] are overwritten.
    """
    if beta == 0:
        p, q = log_p.exp() if wants_gradient else None, log_q.exp()
        losses = group.total(_expectation(q, log_q.sub_(log_p)))
        return losses, None if p is None else p.sub_(q)
    losses = log_p.new_zeros(())
    other = log_q
    if beta < 1:
        other = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
        losses = beta * group.total(_expectation(log_q.exp(), log_q.sub_(other)))
    p, log_ratio = log_p.exp(), log_p.sub_(other)
    del log_q, other
    factor = 1 - beta if beta < 1 else 1.0
    expectation = group.total(_expectation(p, log_ratio))
    losses = losses + factor * expectation
    if not wants_gradient:
        return losses, None
    return losses, p.mul_(log_ratio.sub_(expectation[:, None])).mul_(factor)


def _expectation(p: Tensor, values: Tensor) -> Tensor:
    """sum_v p_v values_v [c], of the classes here; ``values`` become 0 where the probability is."""
    values.masked_fill_(p == 0, 0)
    return (p * values).sum(-1)


# Compiled code and autograd.

_SCHEMA = """linear_distillation(
    Tensor student_input, Tensor student_weight, Tensor? student_bias,
    Tensor teacher_input, Tensor teacher_weight, Tensor? teacher_bias,
    Tensor? counted, Tensor scale, *, float beta, float temperature,
    float student_softcap, float student_logit_scale,
    float teacher_softcap, float teacher_logit_scale, int chunk_size, int memory_budget,
    str vocab_group, int ranks, bool reduce_input_grad, ScalarType? reduce_dtype,
    bool input_grad, bool weight_grad, bool bias_grad
) -> (Tensor, Tensor, Tensor, Tensor)"""
_SCALE = 7  # the last tensor


def _fake(
    student_input: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    *_: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(student_input.dtype, torch.float32)
    gradients = ops.gradients_like(
        student_input, student_weight, student_bias, ops.wanted_gradients(options)
    )
    return student_input.new_empty((), dtype=dtype), *gradients


def _setup_context(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> None:
    loss, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.recompute = inputs[0].dtype == torch.float16
    ctx.options = keyword_only_inputs
    if ctx.recompute:
        ctx.save_for_backward(*inputs)
    else:
        ctx.save_for_backward(loss, *gradients)


def _forward_flops(arguments: dict[str, Any]) -> int:
    student = _flops.product(arguments["student_input"], arguments["student_weight"])
    teacher = _flops.product(arguments["teacher_input"], arguments["teacher_weight"])
    return teacher + student * (1 + _flops.wanted_products(arguments))


@first_derivatives_only
def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    nothing = [None] * (len(ctx.needs_input_grad) - 3)
    if grad_loss is None:
        return None, None, None, *nothing
    if ctx.recompute:
        tensors = list(ctx.saved_tensors)
        tensors[_SCALE] = tensors[_SCALE] * grad_loss
        input_grad, weight_grad, bias_grad = needed
        options = ctx.options | {
            "input_grad": input_grad, "weight_grad": weight_grad, "bias_grad": bias_grad,
        }  # fmt: skip
        gradients = call(_OP, _FUNCTION, tensors, options)[1:]
    else:
        check_flags(_OP.name(), needed, ops.wanted_gradients(ctx.options))
        last = is_last_backward(grad_loss)
        gradients = [_scaled(gradient, grad_loss, last) for gradient in ctx.saved_tensors[1:]]
    wanted = (gradient if need else None for gradient, need in zip(gradients, needed, strict=True))
    return *wanted, *nothing


def _scaled(gradient: Tensor, factor: Tensor, last: bool) -> Tensor:
    """gradient * factor, multiplied in float32 or more; in its own memory at its last use."""
    dtype = factor.dtype
    if not last or gradient.dim() < 2:
        return (gradient.to(dtype) * factor).to(gradient.dtype)
    for begin, end in row_slices(gradient.shape, gradient.device):
        rows = gradient[begin:end]
        rows.copy_(rows.to(dtype) * factor)
    return gradient


_LIBRARY = torch.library.Library("memeff", "FRAGMENT")
_LIBRARY.define(_SCHEMA)
_LIBRARY.impl("linear_distillation", _linear_distillation, "CompositeExplicitAutograd")
_OP = torch.ops.memeff.linear_distillation.default
torch.library.register_fake(_OP.name(), _fake)
torch.library.register_autograd(_OP.name(), _backward, setup_context=_setup_context)
_flops.register(_OP, _forward_flops)
_FUNCTION = function_of(_OP, _setup_context, _backward)
