"""memeff.shift_labels: sequences that ranks share, against one process with all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from checks import Ranks, add, raised
from torch import Tensor

import memeff

BATCH, FEATURES, VOCAB = 2, 6, 23


def one_process(x: Tensor, w: Tensor, labels: Tensor, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dX and dW of the mean over all tokens, by plain PyTorch."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    logits = (x @ w.T)[..., :-shift, :]
    loss = F.cross_entropy(logits.flatten(0, -2), labels[..., shift:].flatten().long())
    return loss.detach(), *torch.autograd.grad(loss, (x, w))


def positions_of(ranks: Ranks, length: int, load_balanced: bool) -> Tensor:
    """The positions that this rank has."""
    if not load_balanced:
        return torch.arange(length).chunk(ranks.size)[ranks.rank]
    chunks = torch.arange(length).chunk(2 * ranks.size)
    return torch.cat([chunks[ranks.rank], chunks[2 * ranks.size - 1 - ranks.rank]])


def problem(lead: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, FEATURES, generator=generator, dtype=torch.float64)
    w = torch.randn(VOCAB, FEATURES, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB, lead, generator=generator)
    labels[torch.rand(lead, generator=generator) < 0.3] = -100
    return x, w, labels.to(dtype)


def check_shards(
    ranks: Ranks, shift: int, load_balanced: bool, dtype: torch.dtype, ignore_index: int | None
) -> None:
    length = 2 * ranks.size * 3
    x, w, labels = problem((BATCH, length), dtype, shift)
    loss, dx, dw = one_process(x, w, labels, shift)
    if ignore_index is not None:
        labels[labels == -100] = ignore_index
    mine = positions_of(ranks, length, load_balanced)
    ours, num_items = memeff.shift_labels(
        labels[:, mine], ranks.group, shift=shift, load_balanced=load_balanced,
        ignore_index=ignore_index,
    )  # fmt: skip
    whole, count = memeff.shift_labels(labels, shift=shift, ignore_index=ignore_index)
    assert torch.equal(ours, whole[:, mine]) and ours.dtype == dtype
    assert num_items.dtype == torch.int64 and num_items == count
    assert count == (labels[:, shift:] != (-100 if ignore_index is None else ignore_index)).sum()

    part, w = x[:, mine].clone().requires_grad_(), w.requires_grad_()
    share = memeff.linear_cross_entropy(
        part, w, ours, num_items=num_items, ignore_index=ignore_index
    )
    grad_part, grad_w = torch.autograd.grad(share, (part, w))
    torch.testing.assert_close(sum(ranks.gather(share.detach())), loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_part, dx[:, mine], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(ranks.gather(grad_w)), dw, rtol=1e-12, atol=1e-12)


def check_groups(ranks: Ranks) -> None:
    """Two pairs of ranks, each with sequences of its own, and two micro-batches; whose gradients
    are averaged."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh: Any = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    data, context = mesh.get_coordinate()
    x, w, labels = problem((2, 2, BATCH, 10), torch.int64, 5)  # micro-batches, data, ...
    _, dx, dw = one_process(x, w, labels, 1)
    mine = slice(5 * context, 5 * context + 5)
    shards = [
        memeff.shift_labels(labels[i, data, :, mine], mesh["context"], count_group=ranks.group)
        for i in range(2)
    ]
    num_items = shards[0][1] + shards[1][1]
    assert num_items == (labels[..., 1:] != -100).sum()
    w.requires_grad_()
    for i, (shifted, _) in enumerate(shards):
        part = x[i, data, :, mine].clone().requires_grad_()
        memeff.linear_cross_entropy(part, w, shifted, num_items=num_items / ranks.size).backward()
        assert part.grad is not None
        torch.testing.assert_close(
            part.grad / ranks.size, dx[i, data, :, mine], rtol=1e-12, atol=1e-12
        )
    assert w.grad is not None
    dist.all_reduce(w.grad, group=ranks.group)
    torch.testing.assert_close(w.grad / ranks.size, dw, rtol=1e-12, atol=1e-12)
    message = raised(lambda: memeff.shift_labels(labels, mesh))
    assert "ValueError: group is a DeviceMesh with 2 dimensions" in message, message


def check_short_shards(ranks: Ranks) -> None:
    labels = torch.zeros(BATCH, 3, dtype=torch.int64)
    for shift, load_balanced, expected in (
        (4, False, "expected at least 4 positions in a shard: shift is 4"),
        (1, True, "expected at least 2 positions in a shard, in 2 chunks of equal length"),
    ):
        message = raised(
            lambda shift=shift, balanced=load_balanced: memeff.shift_labels(  # type: ignore[misc]
                labels, ranks.group, shift=shift, load_balanced=balanced
            )
        )
        assert "ValueError: labels has shape (2, 3)" in message and expected in message, message


for _size in (2, 3):
    for _shift in (1, 3):
        for _load_balanced in (False, True):
            add(
                f"labels-{_size}-{_shift}-{_load_balanced}", _size, check_shards, _shift,
                _load_balanced, torch.int32 if _shift == 3 else torch.int64,
                -1 if _load_balanced and _shift == 1 else None,
            )  # fmt: skip
add("labels-groups", 4, check_groups)
add("labels-short", 2, check_short_shards)
