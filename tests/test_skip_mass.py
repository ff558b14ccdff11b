"""skip_mass: what may be left out of the gradients, and what never is.

On emulated kernels, whose gradients are compared with those of the same kernels without skipping.
"""

from __future__ import annotations

import emulated
import pytest
import torch
from cases import Case, make_inputs, run_memeff
from emulated import no_reports  # noqa: F401

import memeff

pytestmark = emulated.needed

TOKENS, FEATURES, VOCAB, TILE = 140, 16, 1000, 128


@pytest.fixture(params=["sm80,sm80", "sm90,sm90", "sm90,sm90rs"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", request.param)


def rows(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, classifier and targets whose softmax is of that kind."""
    x = torch.randn(TOKENS, FEATURES)
    w = torch.randn(VOCAB, FEATURES)
    y = torch.randint(VOCAB, (TOKENS,))
    if kind == "flat":
        w *= 1e-3
    elif kind == "peaked":  # all mass and all targets in the first of eight tiles of classes
        x[:, 0] = 4
        w[:, 0] = -6
        w[:TILE, 0] = 6
        y %= TILE
    elif kind == "one token decides":  # the others have nothing outside of the first tile
        x[:, 0] = 4
        x[TOKENS // 2] = 0
        w[:, 0] = -6
        w[:TILE, 0] = 6
        y %= TILE
    elif kind == "at the bound":  # tiles whose mass is near e * tile / V for e = 0.1
        x = torch.zeros(TOKENS, FEATURES)
        x[:, 0] = 1
        w[:, 0] = torch.linspace(0, -8, VOCAB)
    return x.bfloat16(), w.bfloat16(), y


def gradients(
    x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, skip_mass: float, **keywords: object
) -> tuple[torch.Tensor, torch.Tensor]:
    x, w = x.requires_grad_(), w.requires_grad_()
    options = {"reduction": "sum", "backend": "emulated"} | keywords
    loss = memeff.linear_cross_entropy(x, w, y, skip_mass=skip_mass, **options)  # type: ignore[call-overload]
    dx, dw = torch.autograd.grad(loss.sum(), (x, w))
    return dx.double(), dw.double()


@pytest.mark.parametrize("kind", ["flat", "peaked", "one token decides", "at the bound", "usual"])
@pytest.mark.parametrize("skip_mass", [1e-3, 0.1, 0.9])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_bound(kind: str, skip_mass: float, smoothing: float, kernels: None) -> None:
    """||error of dx_n|| <= skip_mass * max_v ||W_v||, plus the rounding of both gradients."""
    x, w, y = rows(kind)
    exact, _ = gradients(x, w, y, 0.0, label_smoothing=smoothing)
    skipped, _ = gradients(x, w, y, skip_mass, label_smoothing=smoothing)
    largest = w.double().norm(dim=1).max()
    rounding = 2 * torch.finfo(torch.bfloat16).eps * exact.norm(dim=1)
    assert ((skipped - exact).norm(dim=1) <= skip_mass * largest + rounding).all()


@pytest.mark.parametrize("reduction", ["sum", "none"])  # of kept scores, computed again
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nothing_is_left_out_of_a_flat_softmax(
    smoothing: float, reduction: str, kernels: None
) -> None:
    """Each tile of a flat row has exactly its share of the mass, also the last, smaller one."""
    x, w, y = rows("flat")
    options = {"label_smoothing": smoothing, "reduction": reduction}
    y[:] = 0  # no target keeps another tile
    for exact, skipped in zip(
        gradients(x, w, y, 0.0, **options), gradients(x, w, y, 0.9, **options), strict=True
    ):
        torch.testing.assert_close(skipped, exact, rtol=1e-2, atol=1e-2 * exact.abs().max().item())


def test_tiles_without_mass_are_left_out(kernels: None) -> None:
    """What the classes of skipped tiles would have got is small, and is zero now."""
    x, w, y = rows("peaked")
    _, exact = gradients(x, w, y, 0.0)
    _, skipped = gradients(x, w, y, 1e-3)
    assert (exact[TILE:] != 0).any()
    assert (skipped[TILE:] == 0).all()
    assert torch.equal(skipped[:TILE], exact[:TILE])


def test_one_token_keeps_a_tile_for_all(kernels: None) -> None:
    x, w, y = rows("one token decides")
    for exact, skipped in zip(gradients(x, w, y, 0.0), gradients(x, w, y, 1e-3), strict=True):
        row = slice(0, 1)  # tokens of the first tile of tokens, which the decider belongs to
        assert torch.equal(skipped[row], exact[row])


def budget_for(kept: int, blocks: int, tokens: int, features: int, **options: object) -> int:
    """The smallest one for vocab slices that keep a token's scores per feature in grad_weight, so
    many more in the workspace, and have products of at least so many blocks of tokens."""
    for budget in range(2**14, 2**21, 2**11):
        try:
            plan = memeff.plan(
                tokens, features, 300, torch.bfloat16, reduction="sum", skip_mass=1e-3,
                memory_budget=budget, backend="cuda", compute_capability=(9, 0), **options,  # type: ignore[arg-type]
            )  # fmt: skip
        except ValueError:  # too small
            continue
        if (
            plan.kind == "vocab_slices"
            and plan.stored_in_gradient == features
            and plan.stored_in_workspace >= kept
            and plan.num_chunks > blocks
        ):
            assert plan.num_slices == (3 if features == 24 else 1)
            return budget
    raise AssertionError("no budget")


@pytest.mark.parametrize("case", ["chunks", "slices of kept scores", "slices", "blocks"])
def test_every_tile_has_its_own_mark(case: str, kernels: None) -> None:
    """Each tile of tokens has its mass and targets in another tile of classes. The scores of as
    many tokens as features lie in grad_weight; the others are kept in the workspace or computed
    again. In "blocks" all are kept, and pass through the products in two blocks of tokens."""
    tokens, features, vocab = (2200, 8, 300) if case == "blocks" else (300, 24, 300)
    tile = (torch.arange(tokens) + TILE - features) // TILE % 3
    x, w = torch.randn(tokens, features) / 8, torch.randn(vocab, features) / 8
    x[torch.arange(tokens), tile] = 6
    w[torch.arange(vocab), torch.arange(vocab) // TILE] = 3
    y = tile * TILE + torch.randint(44, (tokens,))
    x, w = x.bfloat16(), w.bfloat16()
    options: dict[str, object] = {} if case == "blocks" else {"accum_dtype": torch.float32}
    exact = gradients(x, w, y, 0.0, **options)
    if case == "chunks":
        options["chunk_size"] = 128
    else:
        wanted = {"slices": (0, 1), "slices of kept scores": (200, 1), "blocks": (2192, 2)}[case]
        options["memory_budget"] = budget_for(*wanted, tokens, features, **options)
    for name, ours, theirs in zip(
        ("dx", "dw"), gradients(x, w, y, 1e-3, **options), exact, strict=True
    ):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-2 * scale, msg=name)


def test_targets_are_never_left_out(kernels: None) -> None:
    """A target without probability has the largest gradient of all: minus one."""
    x, w, y = rows("peaked")
    y = y + 7 * TILE - 20  # in the last tiles, where no mass is
    y = y.clamp(max=VOCAB - 1)
    exact, exact_w = gradients(x, w, y, 0.0)
    skipped, skipped_w = gradients(x, w, y, 1e-3)
    used = y.unique()
    torch.testing.assert_close(skipped_w[used], exact_w[used], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(skipped, exact, rtol=2e-2, atol=2e-2 * exact.abs().max().item())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_recomputed_scores_skip_too(
    reduction: str, dtype: torch.dtype, smoothing: float, kernels: None
) -> None:
    x, w, y = rows("peaked")
    x, w = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
    results = []
    for skip_mass in (0.0, 1e-3):
        loss = memeff.linear_cross_entropy(
            x, w, y, reduction=reduction, label_smoothing=smoothing, skip_mass=skip_mass,
            weight=torch.linspace(0.5, 1.5, VOCAB) if smoothing else None, backend="emulated",
        )  # fmt: skip
        upstream = torch.linspace(0.5, 2, TOKENS) if reduction == "none" else None
        results.append((loss, *torch.autograd.grad(loss, (x, w), upstream)))
    (exact_loss, exact, exact_w), (loss, skipped, skipped_w) = results
    assert torch.equal(loss, exact_loss)
    if dtype == torch.bfloat16 or smoothing:  # fp16 has no numbers as small as those left out
        assert not torch.equal(skipped_w[TILE:], exact_w[TILE:])
    scale = exact.abs().max().item()
    torch.testing.assert_close(skipped, exact, rtol=2e-2, atol=2e-2 * scale)
    torch.testing.assert_close(
        skipped_w, exact_w, rtol=2e-2, atol=2e-3 * exact_w.abs().max().item()
    )


@pytest.mark.parametrize(
    "options", [{"bias": True}, {"softcap": 5.0}, {"bias": True, "label_smoothing": 0.1}], ids=str
)
def test_other_options(options: dict[str, object], kernels: None) -> None:
    case = Case((TOKENS,), FEATURES, VOCAB, torch.bfloat16, **options)  # type: ignore[arg-type]
    inputs = make_inputs(case)
    exact = run_memeff(case, inputs, backend="emulated")
    skipped = run_memeff(case, inputs, backend="emulated", skip_mass=1e-6)
    for name in ("dx", "dw", "db"):
        ours, theirs = getattr(skipped, name), getattr(exact, name)
        if theirs is not None:
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-2, atol=1e-5)


def test_the_cpu_leaves_nothing_out() -> None:
    x, w, y = rows("peaked")
    x.requires_grad_()
    one, other = (
        torch.autograd.grad(memeff.linear_cross_entropy(x, w, y, skip_mass=e), x)[0]
        for e in (0.0, 0.5)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("skip_mass", [-0.1, 1.0, float("nan")])
def test_bad_values(skip_mass: float) -> None:
    x, w, y = rows("usual")
    with pytest.raises(ValueError, match="skip_mass"):
        memeff.linear_cross_entropy(x, w, y, skip_mass=skip_mass)
