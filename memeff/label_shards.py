"""``shift_labels``: next-token labels of sequences that ranks share, and how many of them count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memeff._checks import INDEX_DTYPES, check_flag, check_int, check_tensor
from memeff._options import parse_ignore_index
from memeff._rows import pull_forward
from memeff.vocab_parallel import process_group

__all__ = ["shift_labels"]


def shift_labels(
    labels: Tensor,
    group: Any = None,
    *,
    shift: int = 1,
    ignore_index: int | None = None,
    load_balanced: bool = False,
    count_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """The label that each position predicts, and the number of labels that count.

    Where ranks share a sequence (context parallelism, sharded sequences), the last position of a
    shard predicts the first label of the next one, and the mean of the loss divides by the tokens
    of all ranks. With both done here, the losses of the ranks add up to that of one process:

        labels, num_items = memeff.shift_labels(labels, group)
        loss = memeff.linear_cross_entropy(hidden, weight, labels, num_items=num_items)

    Ranks whose gradients are averaged rather than summed, as DDP and FSDP do, divide ``num_items``
    by their number. Several micro-batches share the sum of their ``num_items``.

    Args:
        labels: [..., T], int64 or int32; not shifted yet. Without ``group`` those of whole
            sequences, which may be sharded in any way afterwards; with it this rank's shard.
        group: the ranks that share the sequences, a torch.distributed.ProcessGroup or a DeviceMesh
            with one dimension. All of them make the same call, with the same leading dimensions.
        shift: how many positions ahead a position predicts.
        ignore_index: a label that does not count; None means -100. The last ``shift`` positions of
            the sequences get it.
        load_balanced: of 2 R chunks of a sequence rank r of R has those with the numbers r and
            2 R - 1 - r, one after the other, as torch's context_parallel and Megatron-Core
            distribute causal attention. Otherwise shards follow the order of the ranks.
        count_group: the ranks whose labels are counted together: those that share sequences and
            those with other sequences. None: ``group``.

    Returns:
        The shifted labels, in the shape and dtype of ``labels``; and their number other than
        ``ignore_index``, over the ranks of ``count_group``: an int64 tensor with one element.

    Raises:
        TypeError, ValueError, RuntimeError: an argument of the wrong type, with a bad value, or
            whose shape or dtype does not fit; a shard (or one of its two chunks) with fewer than
            ``shift`` positions.
    """
    check_tensor("labels", labels)
    if labels.dtype not in INDEX_DTYPES or labels.dim() < 1:
        raise RuntimeError(
            f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}, expected class "
            "indices [..., T] of dtype torch.int64 or torch.int32"
        )
    check_int("shift", shift, "the number of positions ahead, >= 1", least=1)
    ignored = parse_ignore_index("ignore_index", ignore_index)
    check_flag("load_balanced", load_balanced)
    if group is None:
        if load_balanced:
            raise ValueError(
                "load_balanced is True without a group, expected the ranks that share the "
                "sequences; labels of whole sequences are shifted before they are distributed"
            )
        shifted = pull_forward(labels, labels.dim() - 1, shift, ignored)
    else:
        ranks = process_group("shift_labels", group)
        shifted = _shift_shard(labels, ranks, shift, ignored, 2 if load_balanced else 1)

    count = (shifted != ignored).sum()
    counted_by = group if count_group is None else count_group
    if counted_by is not None:
        torch.distributed.all_reduce(count, group=process_group("shift_labels", counted_by))
    return shifted, count


def _shift_shard(labels: Tensor, group: Any, shift: int, ignored: int, parts: int) -> Tensor:
    """The shard of a rank, which has this many chunks of the sequence, shifted."""
    length = labels.shape[-1]
    if length % parts or length < parts * shift:
        equal = "" if parts == 1 else f", in {parts} chunks of equal length"
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, expected at least {parts * shift} positions "
            f"in a shard{equal}: shift is {shift}"
        )
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    chunks = labels.chunk(parts, -1)
    # What the chunk before each of these needs.
    first = torch.stack([chunk[..., :shift] for chunk in chunks])
    of_ranks = [torch.empty_like(first) for _ in range(size)]
    torch.distributed.all_gather(of_ranks, first, group=group)
    # Along the sequence: the first chunks of all ranks, then the second ones the other way round.
    following = [first[0] for first in of_ranks]
    if parts == 2:
        following += [first[1] for first in reversed(of_ranks)]
    following.append(torch.full_like(first[0], ignored))
    places = (rank, 2 * size - 1 - rank)
    return torch.cat(
        [
            torch.cat([chunk[..., shift:], following[place + 1]], -1)
            for chunk, place in zip(chunks, places, strict=False)
        ],
        -1,
    )
