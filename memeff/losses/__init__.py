"""Losses on per-token numbers: plain, differentiable PyTorch on what memeff computes of the logits.

    logprobs = memeff.linear_logprobs(hidden, weight, tokens)        # [B, T], no logits stored
    loss = memeff.losses.grpo_loss(logprobs, advantages, mask)       # a few operations on [B, T]
    loss.backward()                                                  # through both

Log-probabilities have the shape [B, T], sequences by positions; ``mask`` [B, T] says which
positions count (completions, not prompts and padding). What masked positions hold does not matter.
Losses of sequences take one number per sequence: `sequence_logprobs` sums (or averages) them.

Names and defaults are TRL's (version 1.16) where TRL has the loss.
"""

from memeff.losses.classification import (
    focal_loss,
    label_smoothed_cross_entropy,
    mean_logit,
    z_loss,
)
from memeff.losses.distillation import (
    linear_distillation_loss,
    top_k_distillation_loss,
)
from memeff.losses.grpo import grpo_loss, grpo_token_weights
from memeff.losses.kto import kto_loss
from memeff.losses.masking import sequence_logprobs
from memeff.losses.ppo import ppo_loss
from memeff.losses.preference import cpo_loss, dpo_loss, orpo_loss, simpo_loss

__all__ = [
    "cpo_loss",
    "dpo_loss",
    "focal_loss",
    "grpo_loss",
    "grpo_token_weights",
    "kto_loss",
    "label_smoothed_cross_entropy",
    "linear_distillation_loss",
    "mean_logit",
    "orpo_loss",
    "ppo_loss",
    "sequence_logprobs",
    "simpo_loss",
    "top_k_distillation_loss",
    "z_loss",
]
