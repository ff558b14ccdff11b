"""Distillation of a teacher's distribution into a student's, over the whole vocabulary.

With p of the student and q of the teacher, both at ``temperature``, the loss of a token is

    beta = 0          KL(q || p) = sum_v q_v (log q_v - log p_v)                 forward KL
    beta = 1          KL(p || q)                                                 reverse KL
    else              beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p

the generalised Jensen-Shannon divergence of Agarwal et al. 2024 (arXiv 2306.13649), eq. 1, in TRL's
convention. Hinton et al. 2015 (arXiv 1503.02531) multiply by temperature^2, as a factor outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memeff import _checks
from memeff._gradients import refuse_tangents
from memeff._operands import check_device, check_head
from memeff._options import parse_options
from memeff.losses import checks
from memeff.losses.distillation_op import Distillation, Side, Transform, distill
from memeff.losses.masking import kept, masked_mean, wide
from memeff.vocab_parallel import VocabParallel, parse_vocab_parallel, reporting

__all__ = ["linear_distillation_loss", "top_k_distillation_loss"]

_NAMES = [(f"{side}_input", f"{side}_weight", f"{side}_bias") for side in ("student", "teacher")]


def linear_distillation_loss(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    num_items: int | float | Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | str | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> Tensor:
    """Mean divergence between two linear heads, neither one's logits stored.

    Chunk by chunk of the tokens that count: both heads' logits, the divergence, and the gradients
    of the student, in the forward pass (for float16, whose gradients could underflow before a loss
    scale is applied, in the backward pass). The teacher gets none. Tokens that do not count are
    never looked at and cost nothing.

    A class that is impossible (a logit of -inf, such as the bias of a padded class) on one side or
    on both has the divergence and the gradient that the formulas have in the limit.

    Args:
        student_input, student_weight, student_bias: [..., D], [V, D], [V] or None, in one dtype.
        teacher_input, teacher_weight, teacher_bias: [..., D'], [V', D'], [V'] or None, in one
            dtype, which may be another one.
        mask: [...], the tokens that count; None: all.
        beta: 0 forward KL, 1 reverse KL, between them the generalised Jensen-Shannon divergence.
        temperature: divides both heads' logits, after what follows.
        student_softcap, teacher_softcap: c > 0 caps the logits of that side: c * tanh(z / c), after
            the scale.
        student_logit_scale, teacher_logit_scale: multiplies the logits of that side.
        vocab_size: the first classes of both heads, which are all that take part; the others
            (padding) do not count in the softmax. None: all, and then V' must be V.
        num_items: what the sum is divided by; None: the tokens that count. 0 counts as 1.
        chunk_size: tokens per chunk.
        memory_budget: instead, bytes for the blocks of logits of a chunk, as int or like "64MiB".
        vocab_parallel: `memeff.VocabParallel` where the ranks of a process group share both
            vocabularies: weights and biases are then this rank's rows, of the same classes on both
            sides, and all else is the same on every rank. The ranks are not compared: an error of
            one alone ends the others' calls when the group's timeout does.

    Returns:
        The loss, 0-d, float32 (float64 for float64 students). Second derivatives raise an error.

    Raises:
        TypeError, ValueError, RuntimeError: an argument of the wrong type, with a bad value, or
            whose shape, dtype or device does not fit.
    """
    parse_vocab_parallel("vocab_parallel", vocab_parallel)

    def checked() -> tuple[Side, Side, Tensor | None, Tensor | float, Distillation]:
        checks.check_coefficient("beta", beta, checks.FRACTION)
        checks.check_coefficient("temperature", temperature, checks.POSITIVE)
        student = check_head(student_input, student_weight, student_bias, _NAMES[0])
        teacher = check_head(teacher_input, teacher_weight, teacher_bias, _NAMES[1])
        check_device("teacher_input", teacher_input, student_input, "student_input")
        refuse_tangents(dict(zip((*_NAMES[0], *_NAMES[1]), (*student, *teacher), strict=True)))
        lead = student_input.shape[:-1]
        if teacher_input.shape[:-1] != lead:
            raise RuntimeError(
                f"teacher_input has shape {tuple(teacher_input.shape)}, expected the tokens of "
                f"student_input, {tuple(lead)}, in front of its features"
            )
        classes = _shared_classes(student_weight, teacher_weight, vocab_size)
        checks.check_token_mask(mask, lead, "student_input", student_input)
        if chunk_size is not None and memory_budget is not None:
            raise ValueError(
                f"chunk_size is {chunk_size} and memory_budget is {memory_budget!r}, expected only "
                "one"
            )
        if vocab_parallel is not None and vocab_size is not None:
            raise ValueError(
                f"vocab_size is {vocab_size}, expected None with vocab_parallel: padded classes "
                "get a bias of -inf on both sides, or no rank"
            )
        planning = parse_options(chunk_size=chunk_size, memory_budget=memory_budget)
        settings = Distillation(
            beta=float(beta),
            temperature=float(temperature),
            student=_transform("student", student_softcap, student_logit_scale),
            teacher=_transform("teacher", teacher_softcap, teacher_logit_scale),
            chunk_size=planning.chunk_size,
            memory_budget=planning.memory_budget,
            vocab_parallel=vocab_parallel,
        )
        counted = None if mask is None else mask.bool().reshape(-1)
        items = lead.numel() if num_items is None and counted is None else num_items
        divisor = checks.divisor_of(items, counted if counted is not None else student_input)
        return _rows(*student, classes), _rows(*teacher, classes), counted, divisor, settings

    return distill(*reporting(vocab_parallel, checked))


def _shared_classes(student_weight: Tensor, teacher_weight: Tensor, vocab_size: int | None) -> int:
    classes = len(student_weight), len(teacher_weight)
    if vocab_size is None:
        if classes[0] != classes[1]:
            raise RuntimeError(
                f"student_weight has {classes[0]} classes and teacher_weight {classes[1]}, "
                "expected as many; where one of them is padded, vocab_size takes the number of "
                "classes in use"
            )
        return classes[0]
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int or None, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= min(classes):
        raise ValueError(
            f"vocab_size is {vocab_size}, expected a number of classes in [1, {min(classes)}]"
        )
    return vocab_size


def _transform(side: str, softcap: float | None, logit_scale: float) -> Transform:
    if softcap is not None:
        checks.check_coefficient(f"{side}_softcap", softcap, checks.POSITIVE)
    checks.check_coefficient(f"{side}_logit_scale", logit_scale, checks.FINITE)
    if logit_scale == 0:
        raise ValueError(
            f"{side}_logit_scale is {logit_scale}, expected a finite value other than 0"
        )
    return Transform(0.0 if softcap is None else float(softcap), float(logit_scale))


def _rows(
    input: Tensor, weight: Tensor, bias: Tensor | None, classes: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the op takes: rows [N, D] and the classes that take part."""
    if classes < len(weight):
        weight, bias = weight[:classes], None if bias is None else bias[:classes]
    return input.reshape(input.shape[:-1].numel(), input.shape[-1]), weight, bias


def top_k_distillation_loss(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    add_tail: bool = True,
) -> Tensor:
    """Mean forward KL to the K most probable classes of a teacher whose logits are gone.

        sum_k q_k (log q_k - log p_k)  [+ q_rest (log q_rest - log p_rest)],  q_rest = 1 - sum_k q_k

    Args:
        student_logprobs: [..., K], ``memeff.linear_logprobs(hidden, weight, teacher_ids)``.
        teacher_logprobs: [..., K], of the classes ``teacher_ids`` [..., K], distinct per token, for
            example the ``top_logprobs`` of ``memeff.linear_token_statistics(..., top_k=K)``.
        mask: [...], the tokens that count.
        add_tail: count all other classes as one more.
    """
    _checks.check_floats("student_logprobs", student_logprobs)
    checks.check_like("teacher_logprobs", teacher_logprobs, "student_logprobs", student_logprobs)
    if student_logprobs.dim() < 1:
        raise RuntimeError("student_logprobs has shape (), expected [..., K]")
    tokens = student_logprobs.shape[:-1]
    checks.check_token_mask(mask, tokens, "student_logprobs", student_logprobs)
    _checks.check_flag("add_tail", add_tail)
    per_class = None if mask is None else mask.unsqueeze(-1)
    log_p = kept(wide(student_logprobs), per_class)
    log_q = kept(teacher_logprobs.detach().to(log_p.dtype), per_class)
    if add_tail:
        log_p = torch.cat([log_p, _log_rest(log_p)], -1)
        log_q = torch.cat([log_q, _log_rest(log_q)], -1)
    # A class without probability adds nothing, whatever the student thinks of it.
    impossible = log_q == -torch.inf
    difference = log_q.masked_fill(impossible, 0) - log_p.masked_fill(impossible, 0)
    return masked_mean((log_q.exp() * difference).sum(-1), mask)


def _log_rest(logprobs: Tensor) -> Tensor:
    """log(1 - sum_k p_k) [..., 1], of at least the rounding error that the sum may have."""
    rest = 1 - logprobs.exp().sum(-1, keepdim=True)
    return rest.clamp(min=torch.finfo(logprobs.dtype).eps).log()
