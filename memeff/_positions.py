"""K-dimensional losses: linear_weight [V, d1, ..., dK, D] is P = d1 * ... * dK classifiers [V, D].

Each position is one call of the op, over views of the weight and the same input rows. All positions
divide by one denominator that they share, so the loss is the sum over the positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from memeff._call import RowResults, Settings, call_op


def each_position(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: Tensor | None,
    settings: Settings,
) -> RowResults:
    """input [N, D], target [N, d1, ..., dK] or [N, V, d1, ..., dK]; results are [N, P]."""
    rows = (input, linear_weight, target, linear_bias)
    if settings.reduction != "mean" or num_items is not None:
        return _sum_of_positions(*rows, weight, token_weight, num_items, settings)
    denominator, counted = _denominators(linear_weight, target, weight, settings.ignore_index)
    if weight is None or not settings.z_loss or denominator is counted:
        return _mean(rows, weight, token_weight, denominator, settings)
    # The terms of the loss have two denominators. Class weights of 0 leave the z-loss.
    no_z_loss = settings._replace(z_loss=0.0)
    cross_entropy = _mean(rows, weight, token_weight, denominator, no_z_loss)
    z_loss = _mean(rows, torch.zeros_like(weight), token_weight, counted, settings)
    statistics = cross_entropy.statistics.clone()
    if settings.statistics:
        statistics[0] += z_loss.statistics[0]
    return cross_entropy._replace(loss=cross_entropy.loss + z_loss.loss, statistics=statistics)


def _mean(
    rows: tuple[Tensor, Tensor, Tensor, Tensor | None],
    weight: Tensor | None,
    token_weight: Tensor | None,
    denominator: Tensor,
    settings: Settings,
) -> RowResults:
    """``_sum_of_positions`` over a denominator that may be 0, which the op would refuse."""
    nothing = denominator == 0
    num_items = denominator.masked_fill(nothing, 1)
    results = _sum_of_positions(*rows, weight, token_weight, num_items, settings)
    return results._replace(loss=results.loss.masked_fill(nothing, math.nan))


def _sum_of_positions(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: Tensor | None,
    settings: Settings,
) -> RowResults:
    weights = linear_weight.movedim(0, -2).flatten(0, -3).unbind(0)
    # Views again; their gradients are added up by one sum instead of P - 1 rounded additions.
    inputs = input.expand(len(weights), *input.shape).unbind(0)
    probabilities = target.dim() == linear_weight.dim()
    targets = target.flatten(2).unbind(2) if probabilities else target.flatten(1).unbind(1)
    biases = _columns(linear_bias, len(weights))
    tokens = _columns(token_weight, len(weights))
    results = [
        call_op(x, w, y, b, weight, t, num_items, settings)
        for x, w, y, b, t in zip(inputs, weights, targets, biases, tokens, strict=True)
    ]
    loss = torch.stack([result.loss for result in results], dim=-1)
    return RowResults(
        loss if settings.reduction == "none" else loss.sum(),
        *(torch.stack(field, dim=-1) for field in list(zip(*results, strict=True))[1:]),
    )


def _columns(tensor: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """The positions of a tensor [rows, d1, ..., dK], or as many times None."""
    return [None] * count if tensor is None else tensor.flatten(1).unbind(1)


def _denominators(
    linear_weight: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """What the mean divides by: (denominator of the cross entropy, number of counted tokens)."""
    if target.dim() == linear_weight.dim():  # class probabilities
        tokens = target.shape[0] * math.prod(target.shape[2:])
        count = torch.full((), tokens, dtype=torch.int64, device=target.device)
        return count, count
    counted = target != ignore_index
    count = counted.sum()
    if weight is None:
        return count, count
    # Out-of-range targets are reported by the op; here they must only not crash.
    index = target.long().clamp(0, weight.shape[0] - 1)
    # In float64, as the op sums the denominator of one position, whatever the dtype of the weights.
    return weight[index].where(counted, 0).sum(dtype=torch.float64), count
