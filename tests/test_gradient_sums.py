"""GradientSum: digits that 16-bit gradients keep while chunks add to them, and what it costs."""

from __future__ import annotations

import pytest
import torch

from memeff._gradient_sums import GradientSum

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]


def sum_of_products(
    dtype: torch.dtype, rows: int, columns: int, chunks: int
) -> tuple[GradientSum, torch.Tensor]:
    """The sum of `chunks` products, and the same in float64."""
    total = GradientSum((rows, columns), dtype, CPU)
    exact = torch.zeros(rows, columns, dtype=torch.float64)
    middle = rows // 3
    for _ in range(chunks):
        left, right = torch.randn(rows, 5), torch.randn(5, columns)
        total.add_product(0, middle, left[:middle], right)
        total.add_product(middle, rows, left[middle:], right)
        exact += left.double() @ right.double()
    return total, exact


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("columns", [1, 31, 37, 64, 96, 100])
@pytest.mark.parametrize("factor", [None, 1.7])
def test_rounded_once(dtype: torch.dtype, columns: int, factor: float | None) -> None:
    """As if all had been in float64: many chunks and a factor add next to nothing to the error."""
    total, exact = sum_of_products(dtype, 40, columns, chunks=64)
    exact *= factor or 1.0
    upstream = None if factor is None else torch.tensor(factor)
    kept = total.times(upstream, last=False)
    result = total.times(upstream, last=True)
    assert result.dtype == dtype and torch.equal(result, kept)
    # float16 rounds to 2^-11, of the order of what 64 chunks add.
    assert error(result, exact) <= error(exact.to(dtype), exact) + 64**0.5 * 2**-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_a_row_with_one_large_column(dtype: torch.dtype) -> None:
    """Units belong to 32 elements: what is far from the large one keeps its digits."""
    values = torch.randn(4, 128)
    values[:, 5] *= 1e4
    total = GradientSum(values.shape, dtype, CPU)
    total.write(slice(0, len(values)), values.clone())
    result, others = total.times(None, last=True)[:, 32:], values[:, 32:]
    bound = 2.0**-15 * others.abs().max().item()  # with the large one it would be 1000 times that
    torch.testing.assert_close(result, others.to(dtype), atol=bound, rtol=torch.finfo(dtype).eps)


def test_blocks_are_bounded_by_their_largest_element() -> None:
    """Powers of two and what is just below them, in both signs; zeros stay zeros."""
    values = torch.tensor([1.0, -1.0, 2 - 2**-20, -(2 - 2**-20), 0.0, 2.0**-14, 1 / 3, -5e-5])
    total = GradientSum((1, 8), torch.bfloat16, CPU)
    total.write(slice(0, 1), values[None].clone())
    kept = total._load(slice(0, 1))[0]
    assert (kept - values).abs().max() <= 2.0**-14  # of a largest element of 2: one unit
    assert kept[4] == 0
    tiny = GradientSum((1, 8), torch.bfloat16, CPU)
    tiny.write(slice(0, 1), values[None] * 2.0**-126)
    assert tiny.times(None, last=True).isfinite().all()


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_inf_and_nan_are_seen(odd: float) -> None:
    values = torch.randn(3, 64)
    values[1, 40] = odd
    total = GradientSum(values.shape, torch.bfloat16, CPU)
    total.write(slice(0, len(values)), values.clone())
    total.add_product(0, 3, torch.zeros(3, 2), torch.zeros(2, 64))
    result = total.times(None, last=True)
    assert not result[1, 40].isfinite()
    finite = result.isfinite()
    assert finite[[0, 2]].all() and finite[1, :32].all()


def test_memory() -> None:
    """A 32nd more than the gradient, which in the end lies in the same memory."""
    total = GradientSum((50, 64), torch.bfloat16, CPU)
    gradient_bytes = 50 * 64 * 2
    units = total._units
    assert units is not None and units.nbytes == gradient_bytes // 32
    address = total._numbers.data_ptr()
    assert total._numbers.nbytes == gradient_bytes
    assert total.times(torch.tensor(2.0), last=True).data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_by_index(dtype: torch.dtype) -> None:
    """Rows that are written out of order; the others stay zero."""
    values = torch.randn(3, 64)
    total = GradientSum((6, 64), dtype, CPU)
    total.write(torch.tensor([4, 0, 3]), values.clone())
    expected = torch.zeros(6, 64)
    expected[[4, 0, 3]] = values
    result = total.times(None, last=True)
    torch.testing.assert_close(
        result, expected.to(dtype), atol=2.0**-13, rtol=torch.finfo(dtype).eps
    )


def test_vectors_and_empty_matrices() -> None:
    vector = GradientSum((7,), torch.bfloat16, CPU)
    for _ in range(256):
        vector.add(torch.full((1, 7), 0.01))
    result = vector.times(torch.tensor(0.5), last=True)
    torch.testing.assert_close(result, torch.full((7,), 1.28).bfloat16())
    for shape in ((0, 8), (3, 0)):
        empty = GradientSum(shape, torch.bfloat16, CPU)
        empty.add_product(0, shape[0], torch.zeros(shape[0], 2), torch.zeros(2, shape[1]))
        assert empty.times(None, last=True).shape == shape
