"""Memory budgets keep their word: what forward accepts works in backward, whatever is
differentiated, and the minimum that an error names is enough."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import memeff

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Forward and backward with a memory budget.
Step = Callable[[int], None]


def choose(*values: Any) -> Any:
    return random.choice(values)


def draw_leaves() -> tuple[list[Tensor], Tensor, tuple[int, int, int]]:
    """x, w, b, some of which require grad; the target; N, D, V."""
    dtype = choose(*DTYPES)
    tokens, features, vocab = choose(10, 130, 400), choose(3, 24, 100), choose(2, 70, 1500)
    leaves = [
        torch.randn(shape).to(dtype) for shape in ((tokens, features), (vocab, features), (vocab,))
    ]
    wanted = choose((1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0))
    for leaf, want in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(bool(want))
    target = torch.randint(vocab, (tokens,))
    target[torch.rand(tokens) < 0.2] = -100
    return leaves, target, (tokens, features, vocab)


def differentiate(outputs: list[Tensor]) -> None:
    """Backward through each output alone and through all of them."""
    able = [output for output in outputs if output.requires_grad]
    for output in able:
        output.sum().backward(retain_graph=True)
    if able:
        torch.autograd.backward([output.sum() for output in able])


def draw_loss() -> tuple[str, Step]:
    (x, w, b), target, (tokens, _, vocab) = draw_leaves()
    options: dict[str, Any] = {
        "reduction": choose("mean", "sum", "none"), "softcap": choose(None, 3.0),
        "label_smoothing": choose(0.0, 0.1), "return_statistics": choose(False, True),
        "accum_dtype": choose(None, torch.promote_types(x.dtype, torch.float32)),
        "weight": choose(None, torch.rand(vocab)), "z_loss": choose(0.0, 0.1),
    }  # fmt: skip
    if random.random() < 0.2:
        target = torch.rand(tokens, vocab).softmax(1)

    def step(budget: int) -> None:
        result = memeff.linear_cross_entropy(
            x, w, target, linear_bias=b, memory_budget=budget, **options
        )
        differentiate([result[0] if isinstance(result, tuple) else result])

    return f"{x.shape} {w.shape} {x.dtype} {options}", step


def draw_statistics() -> tuple[str, Step]:
    (x, w, b), target, (tokens, _, vocab) = draw_leaves()
    options: dict[str, Any] = {
        "softcap": choose(None, 3.0), "entropy": choose(False, True),
        "argmax": choose(False, True), "logit_sum": choose(False, True),
        "log_sum_sq_probs": choose(False, True), "top_k": choose(0, 0, min(2, vocab)),
    }  # fmt: skip
    several = choose(None, target, torch.randint(vocab, (tokens, 3)))

    def step(budget: int) -> None:
        fields = memeff.linear_token_statistics(
            x, w, several, linear_bias=b, memory_budget=budget, **options
        )
        differentiate([field for field in fields if field is not None])

    return f"{x.shape} {w.shape} {x.dtype} {options}", step


def draw_linear_loss() -> tuple[str, Step]:
    (x, w, b), target, _ = draw_leaves()
    entropy, logit_sum = choose(False, True), choose(False, True)
    options: dict[str, Any] = {
        "softcap": choose(None, 3.0), "reduction": choose("mean", "none"), "entropy": entropy,
        "logit_sum": logit_sum,
    }  # fmt: skip

    def loss(s: memeff.LogitStatistics) -> Tensor:
        result = s.lse - s.logprob
        result = result + s.entropy if entropy and s.entropy is not None else result
        return result + s.logit_sum if logit_sum and s.logit_sum is not None else result

    def step(budget: int) -> None:
        differentiate(
            [memeff.linear_loss(loss, x, w, target, linear_bias=b, memory_budget=budget, **options)]
        )

    return f"{x.shape} {w.shape} {x.dtype} {options}", step


@pytest.mark.parametrize("draw", [draw_loss, draw_statistics, draw_linear_loss])
@pytest.mark.parametrize("kernels", ["blas", "bf16_portable"])
def test_the_minimum_is_enough_and_so_is_more(
    draw: Callable[[], tuple[str, Step]], kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward from the minimum of the error upward; below it, an error at once."""
    monkeypatch.setenv("MEMEFF_CPU_KERNELS", kernels)
    errors = 0
    for _ in range(25):
        what, step = draw()
        try:
            step(1)
            continue  # nothing to compute
        except ValueError as error:
            message = str(error)
        assert "the minimum is" in message, what
        errors += 1
        minimum = int(message.split("the minimum is ")[1].split()[0])
        if "torch's matrix products take" in message:
            theirs = int(message.split("products take ")[1].split()[0])
            assert 0 < theirs < minimum, what
        for budget in (minimum, int(minimum * 1.07), minimum * 4):
            try:
                step(budget)
            except ValueError as error:
                raise AssertionError(f"{what} with {budget} of at least {minimum}") from error
        with pytest.raises(ValueError, match=f"the minimum is {minimum} "):
            step(minimum - 1)
    assert errors >= 20


@pytest.mark.parametrize("names", [("entropy",), ("logit_sum",), ("entropy", "logit_sum")], ids=str)
def test_forward_knows_the_later_plans(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a soft cap the gradients of these statistics are other kernels', which need more."""
    monkeypatch.setenv("MEMEFF_CPU_KERNELS", "bf16_portable")
    x, w = (torch.randn(n, 24).bfloat16().requires_grad_() for n in (130, 1500))
    target = torch.randint(1500, (130,))

    def forward(budget: int, **options: bool) -> memeff.LogitStatistics:
        return memeff.linear_token_statistics(
            x, w, target, softcap=3.0, memory_budget=budget, **{"entropy": False, **options}
        )

    def minimum(**options: bool) -> int:
        with pytest.raises(ValueError, match="the minimum is") as caught:
            forward(1, **options)
        return int(str(caught.value).split("the minimum is ")[1].split()[0])

    wanted = dict.fromkeys(names, True)
    least = minimum(**wanted)
    assert least > minimum(), "the case shows nothing"
    fields = forward(least, **wanted)
    differentiate([value for value in fields if value is not None])
    with pytest.raises(ValueError, match=f"the minimum is {least} "):
        forward(least - 1, **wanted)


def test_what_products_take_is_named() -> None:
    """A small call in float32 has a floor that its shapes do not explain: MKL's buffers."""
    x, w = torch.randn(10, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"of which torch's matrix products take \d+ bytes"):
        memeff.linear_cross_entropy(x, w, torch.randint(2, (10,)), memory_budget=1000)
