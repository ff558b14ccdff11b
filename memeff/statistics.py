"""Per-token numbers that come out of the same pass over the logits as the loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["LogitStatistics", "TokenStatistics"]


class TokenStatistics(NamedTuple):
    """Statistics of every token; each field has the shape of the loss under ``reduction="none"``.

    They are float32 (float64 for float64 inputs), except ``argmax`` (int64) and ``correct`` (bool),
    and detached: no gradient flows through them. Logits are meant after ``logit_scale`` and
    ``softcap``; p is their softmax. Tokens whose target is ``ignore_index`` are not looked at: all
    their fields are 0 (``correct`` is False).
    """

    loss: Tensor
    """The token's loss with everything asked for: weights, label smoothing, z-loss; not reduced."""
    lse: Tensor
    """log sum_v exp z_v, the logarithm of the softmax denominator."""
    target_logit: Tensor
    """z_y; for class-probability targets q the expected logit sum_v q_v z_v."""
    logprob: Tensor
    """log p_y = target_logit - lse, free of weights and smoothing."""
    entropy: Tensor
    """-sum_v p_v log p_v, in nats."""
    max_logit: Tensor
    """max_v z_v."""
    argmax: Tensor
    """The v with the largest logit: the greedy prediction."""
    correct: Tensor
    """Whether argmax is the target (for class probabilities: the most probable class)."""


class LogitStatistics(NamedTuple):
    """What `memeff.linear_token_statistics` computes of every token's row of logits.

    Fields have the leading dimensions of the input and are float32 (float64 for float64 inputs) or
    int64; those that were not asked for are None. All but ``max_logit``, ``argmax`` and the largest
    ones are differentiable. Logits are meant after ``logit_scale`` and ``softcap``; p is their
    softmax.
    """

    logprob: Tensor | None
    """log p of the target, or [..., K] of each; 0 where the target is ``ignore_index``."""
    lse: Tensor
    """log sum_v exp z_v."""
    entropy: Tensor | None
    """-sum_v p_v log p_v, in nats."""
    max_logit: Tensor
    """max_v z_v."""
    argmax: Tensor | None
    """The v with the largest logit."""
    logit_sum: Tensor | None
    """sum_v z_v. The mean of log p_v over all classes is ``mean_logit - lse``."""
    mean_logit: Tensor | None
    """sum_v z_v / V."""
    log_sum_sq_probs: Tensor | None
    """log sum_v p_v^2, minus the Renyi entropy of order 2."""
    top_logprobs: Tensor | None
    """[..., top_k] the largest log p_v, in descending order."""
    top_ids: Tensor | None
    """[..., top_k] their v."""
