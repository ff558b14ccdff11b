"""Distillation of a teacher's distribution into a student's, over the whole vocabulary.

With p of the student and q of the teacher, both at ``temperature``, the loss of a token is

    beta = 0          KL(q || p) = sum_v q_v (log q_v - log p_v)                 forward KL
    beta = 1          KL(p || q)                                                 reverse KL
    else              beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p

the generalised Jensen-Shannon divergence of Agarwal et al. 2024 (arXiv 2306.13649), eq. 1, in TRL's
convention. Hinton et al. 2015 (arXiv 1503.02531) multiply by temperature^2, as a factor outside.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from memeff import _arguments
from memeff._heads import Head, choose_chunk_size
from memeff.chunked import chunked_linear_apply
from memeff.losses.masking import check_mask, masked_mean

__all__ = ["linear_distillation_loss", "top_k_distillation_loss"]


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
    num_items: int | float | Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | str | None = None,
) -> Tensor:
    """Mean divergence between two linear heads, neither one's logits stored.

    Chunk by chunk of the tokens: both heads' logits, the divergence, and by autograd the gradients
    of the student, in the forward pass. The teacher gets none.

    Args:
        student_input, student_weight, student_bias: [..., D], [V, D], [V] or None.
        teacher_input, teacher_weight, teacher_bias: [..., D'], [V, D'], [V] or None; the widths may
            differ, the vocabulary must not.
        mask: [...], the tokens that count; None: all.
        beta: 0 forward KL, 1 reverse KL, between them the generalised Jensen-Shannon divergence.
        temperature: divides both heads' logits.
        num_items: what the sum is divided by; None: the tokens that count.
        chunk_size: tokens per chunk.
        memory_budget: instead, bytes for the blocks of logits of a chunk.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}, expected a value in [0, 1]")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a value > 0")
    lead = student_input.shape[:-1]
    if teacher_input.shape[:-1] != lead or len(teacher_weight) != len(student_weight):
        raise RuntimeError(
            f"teacher_input has shape {tuple(teacher_input.shape)} and teacher_weight "
            f"{tuple(teacher_weight.shape)}, expected the tokens {tuple(lead)} and the "
            f"{len(student_weight)} classes of the student"
        )
    counted = torch.ones(lead, dtype=torch.bool, device=student_input.device)
    if mask is not None:
        check_mask("the tokens", counted, mask)
        counted = mask.bool()
    size = choose_chunk_size(
        lead.numel(),
        student_weight,
        2 * max(4, student_input.element_size()),  # two heads
        _arguments.parse_chunk_size(chunk_size),
        _arguments.parse_memory_budget(memory_budget),
    )
    teacher = Head(
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        upcast=True,
    )

    def divergence(student_logits: Tensor, teacher_rows: Tensor, counted: Tensor) -> Tensor:
        with torch.no_grad():
            log_q = log_softmax(
                teacher.logits(teacher_rows.to(teacher.weight.dtype)) / temperature, -1
            )
        log_p = log_softmax(student_logits / temperature, -1)
        per_token = _divergence(log_p, log_q, beta)
        return torch.where(counted, per_token, 0).sum()

    total = chunked_linear_apply(
        divergence,
        student_input,
        student_weight,
        teacher_input.detach(),
        counted,
        linear_bias=student_bias,
        chunk_size=size,
    )
    assert isinstance(total, Tensor)
    return total / (counted.sum().clamp(min=1) if num_items is None else num_items)


def _divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Per token, from log-probabilities [c, V] of student and teacher."""
    if beta == 0:
        return _kl(log_q, log_p)
    if beta == 1:
        return _kl(log_p, log_q)
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v p (log p - log q); a class without probability adds nothing."""
    impossible = log_p == -torch.inf
    difference = (log_p - log_q).masked_fill(impossible, 0)
    return (log_p.exp() * difference).sum(-1)


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
    if student_logprobs.shape != teacher_logprobs.shape:
        raise RuntimeError(
            f"teacher_logprobs has shape {tuple(teacher_logprobs.shape)}, expected that of "
            f"student_logprobs, {tuple(student_logprobs.shape)}"
        )
    log_q = teacher_logprobs.detach()
    if add_tail:
        student_logprobs = torch.cat([student_logprobs, _log_rest(student_logprobs)], -1)
        log_q = torch.cat([log_q, _log_rest(log_q)], -1)
    per_token = _kl(log_q, student_logprobs)
    check_mask("the tokens", per_token, mask)
    return masked_mean(per_token, mask)


def _log_rest(logprobs: Tensor) -> Tensor:
    """log(1 - sum_k p_k) [..., 1], of at least the rounding error that the sum may have."""
    rest = 1 - logprobs.exp().sum(-1, keepdim=True)
    return rest.clamp(min=torch.finfo(logprobs.dtype).eps).log()
