"""K-dimensional weights: linear_weight [V, d1, ..., dK, D] is P = d1 * ... * dK classifiers [V, D].

Each position is one call of the op, over views of the weight and the same input rows. All positions
of a loss divide by one denominator that they share, so the loss is the sum over the positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from memeff._call import Call, RowResults, call_loss


def each_position(call: Call) -> RowResults:
    """input [N, D], target [N, d1, ..., dK] or [N, V, d1, ..., dK]; results are [N, P]."""
    options = call.options
    if options.reduction != "mean" or call.num_items is not None:
        return _sum_of_positions(call)
    denominator, counted = _denominators(call)
    if call.weight is None or not options.z_loss or denominator is counted:
        return _mean(call, denominator)
    # The terms of the loss have two denominators. Class weights of 0 leave the z-loss.
    cross_entropy = _mean(call._replace(options=options._replace(z_loss=0.0)), denominator)
    z_loss = _mean(call._replace(weight=torch.zeros_like(call.weight)), counted)
    statistics = cross_entropy.statistics.clone()
    if options.return_statistics:
        statistics[0] += z_loss.statistics[0]
    return cross_entropy._replace(loss=cross_entropy.loss + z_loss.loss, statistics=statistics)


def _mean(call: Call, denominator: Tensor) -> RowResults:
    """``_sum_of_positions`` over a denominator that may be 0, which the op would refuse."""
    nothing = denominator == 0
    results = _sum_of_positions(call._replace(num_items=denominator.masked_fill(nothing, 1)))
    return results._replace(loss=results.loss.masked_fill(nothing, math.nan))


def _sum_of_positions(call: Call) -> RowResults:
    results = [call_loss(one) for one in split(call)]
    loss = torch.stack([result.loss for result in results], dim=-1)
    return RowResults(
        loss if call.options.reduction == "none" else loss.sum(),
        *(torch.stack(field, dim=-1) for field in list(zip(*results, strict=True))[1:]),
    )


def split(call: Call) -> list[Call]:
    """The call of each position, of target [N, d1, ..., dK], [N, V, d1, ..., dK] with class
    probabilities, or [N, d1, ..., dK, k]: input [N, D], linear_weight [V, D], target [N], [N, V] or
    [N, k]."""
    weights = call.linear_weight.movedim(0, -2).flatten(0, -3).unbind(0)
    # Views again; their gradients are added up by one sum instead of P - 1 rounded additions.
    inputs = call.input.expand(len(weights), *call.input.shape).unbind(0)
    positions = call.linear_weight.dim() - 2
    first = 2 if call.probabilities else 1
    targets = columns(call.target, len(weights), positions, first)
    biases = columns(call.linear_bias, len(weights), positions)
    tokens = columns(call.token_weight, len(weights), positions)
    return [
        call._replace(input=x, linear_weight=w, target=y, linear_bias=b, token_weight=t)
        for x, w, y, b, t in zip(inputs, weights, targets, biases, tokens, strict=True)
    ]


def columns(
    tensor: Tensor | None, count: int, positions: int, first: int = 1
) -> Sequence[Tensor | None]:
    """The positions of a tensor that has them from dimension ``first`` on; of None, as many."""
    if tensor is None:
        return [None] * count
    return tensor.flatten(first, first + positions - 1).unbind(first)


def _denominators(call: Call) -> tuple[Tensor, Tensor]:
    """What the mean divides by: (denominator of the cross entropy, number of counted tokens)."""
    target, weight = call.target, call.weight
    assert target is not None
    if call.probabilities:
        tokens = target.shape[0] * math.prod(target.shape[2:])
        count = torch.full((), tokens, dtype=torch.int64, device=target.device)
        return count, count
    counted = target != call.options.ignore_index
    count = counted.sum()
    if weight is None:
        return count, count
    shared, classes = call.options.vocab_parallel, len(weight)
    index = target.long()
    if shared is not None:
        index = index - shared.first_class(classes, weight.device)
    # A class of another rank counts there. Out-of-range targets are reported by the op; here they
    # must only not crash.
    here = counted & (index >= 0) & (index < classes)
    found = torch.nn.functional.pad(weight, (0, 1))[index.where(here, classes)]
    # In float64, as the op sums the denominator of one position, whatever the dtype of the weights.
    total = found.sum(dtype=torch.float64)
    return total if shared is None else shared.gather(total).sum(), count
