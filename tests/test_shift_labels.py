"""memeff.shift_labels in one process; tests/distributed has sequences that ranks share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memeff


def test_whole_sequences() -> None:
    labels = torch.tensor([[1, 2, -100, 3], [4, -100, 5, 6]])
    shifted, count = memeff.shift_labels(labels)
    assert shifted.tolist() == [[2, -100, 3, -100], [-100, 5, 6, -100]]
    assert (count.item(), count.dtype, count.shape) == (4, torch.int64, ())
    shifted, count = memeff.shift_labels(labels[0].int(), shift=2, ignore_index=7)
    assert (shifted.tolist(), shifted.dtype, count.item()) == ([-100, 3, 7, 7], torch.int32, 2)
    shifted, count = memeff.shift_labels(labels, shift=9)
    assert (shifted.unique().tolist(), count.item()) == ([-100], 0)
    assert labels[0, 0] == 1  # the argument is left alone


def test_the_loss_is_that_of_shift() -> None:
    x, w = torch.randn(2, 9, 5), torch.randn(11, 5)
    labels = torch.randint(11, (2, 9))
    labels[0, :4] = -100
    shifted, count = memeff.shift_labels(labels)
    for num_items in (None, count):
        ours = memeff.linear_cross_entropy(x, w, shifted, num_items=num_items)
        torch.testing.assert_close(ours, memeff.linear_cross_entropy(x, w, labels, shift=True))


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([1, 2], {}, TypeError, "labels must be a torch.Tensor, got list"),
    (torch.zeros(3), {}, RuntimeError, "labels has shape (3,) and dtype torch.float32, expected"),
    (torch.tensor(1), {}, RuntimeError, "labels has shape () and dtype torch.int64, expected"),
    (torch.tensor([1]), {"shift": 0}, ValueError, "shift is 0, expected the number of positions"),
    (torch.tensor([1]), {"shift": True}, TypeError, "shift must be an int"),
    (torch.tensor([1]), {"ignore_index": "x"}, TypeError, "ignore_index must be an int"),
    (torch.tensor([1]), {"load_balanced": True}, ValueError, "load_balanced is True without a"),
    (torch.tensor([1]), {"load_balanced": 1}, TypeError, "load_balanced must be a bool"),
    (torch.tensor([1]), {"group": object()}, RuntimeError, "shift_labels needs torch.distributed"),
    (torch.tensor([1]), {"count_group": 3}, RuntimeError, "shift_labels needs torch.distributed"),
]


@pytest.mark.parametrize(("labels", "options", "kind", "text"), BAD)
def test_bad_arguments(
    labels: Any, options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind) as caught:
        memeff.shift_labels(labels, **options)
    assert text in str(caught.value)
