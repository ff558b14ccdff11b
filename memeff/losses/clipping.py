"""The clipped objective that PPO and the GRPO family share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clipped_objective(
    log_ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float, delta: float | None
) -> Tensor:
    """min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A) for r = exp(log_ratio).

    Whatever the sign of A, this is A times a ratio that is bounded on one side (without delta):

        A >= 0    min(r, 1 + epsilon_high, delta)
        A < 0     min(max(r, 1 - epsilon), max(1 + epsilon_high, delta))

    The bounds are applied to the logarithm. Clipping exp(log_ratio) instead has the derivative
    0 * exp(log_ratio), which is nan where the exponential overflows (in float32 from 88.8 on).
    """
    high = 1 + epsilon_high
    of_gain = high if delta is None else min(high, delta)
    of_loss = math.inf if delta is None else max(high, delta)
    clipped = torch.where(
        advantages < 0,
        log_ratio.clamp(_log(1 - epsilon), _log(of_loss)),
        log_ratio.clamp(max=_log(of_gain)),
    )
    return clipped.exp() * advantages


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
