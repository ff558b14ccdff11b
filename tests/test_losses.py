"""memeff.losses against the papers' formulas, written out token by token in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import memeff
from memeff import losses

B, T = 5, 9


def batch(masked_row: bool = True) -> dict[str, Tensor]:
    """Log-probabilities [B, T]; masked positions hold nan, as nobody may look at them."""
    mask = torch.rand(B, T) < 0.7
    mask[:, 0] = True
    if masked_row:
        mask[2] = False
    result = {"mask": mask, "advantages": torch.randn(B, dtype=torch.float64)}
    for name, spread in (("logprobs", 0.0), ("old", 0.6), ("ref", 0.4)):
        base = result.get("logprobs", -torch.rand(B, T, dtype=torch.float64) * 3)
        values = base + spread * torch.randn(B, T, dtype=torch.float64)
        result[name] = values.masked_fill(~mask, torch.nan)
    result["logprobs"].requires_grad_()
    return result


def same(ours: Tensor, expected: Tensor, leaf: Tensor, mask: Tensor | None = None) -> None:
    """Equal values and gradients; no gradient where the mask is zero."""
    torch.testing.assert_close(ours, expected)
    (a,) = torch.autograd.grad(ours * 1.7, leaf, retain_graph=True)
    (b,) = torch.autograd.grad(expected * 1.7, leaf, retain_graph=True)
    if mask is not None:
        assert not a[~mask].any()
        a, b = a[mask], b[mask]
    torch.testing.assert_close(a, b)


def grpo_by_hand(data: dict[str, Tensor], kind: str, level: str, **options: Any) -> Tensor:
    eps, high = options["epsilon"], options.get("epsilon_high") or options["epsilon"]
    beta, delta = options.get("beta", 0.0), options.get("delta")
    per_sequence, count = [], 0
    for b in range(B):
        positions = [t for t in range(T) if data["mask"][b, t]]
        count += len(positions)
        log_ratios = [data["logprobs"][b, t] - data["old"][b, t] for t in positions]
        if level == "sequence" and positions:
            log_ratios = [sum(log_ratios) / len(positions)] * len(positions)
        terms = []
        for t, log_ratio in zip(positions, log_ratios, strict=True):
            r, advantage = torch.exp(log_ratio), data["advantages"][b]
            if kind == "cispo":
                term = -min(r.item(), high) * advantage * data["logprobs"][b, t]
            else:
                unclipped = r if delta is None else torch.clamp(r, max=delta)
                clipped = torch.clamp(r, 1 - eps, 1 + high)
                term = -torch.minimum(unclipped * advantage, clipped * advantage)
            if beta:
                d = data["ref"][b, t] - data["logprobs"][b, t]
                kl = torch.exp(d) - d - 1
                corrected = options.get("use_bias_correction_kl", True)
                term = term + beta * (kl * torch.exp(log_ratio) if corrected else kl)
            terms.append(term)
        per_sequence.append(terms)
    total = sum(sum(terms) for terms in per_sequence if terms)
    if kind == "grpo":
        return sum(sum(terms) / len(terms) for terms in per_sequence if terms) / B
    if kind == "dr_grpo":
        return total / (B * options.get("max_completion_length", T))
    return total / options.get("num_items", count)


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epsilon_high": 0.28, "beta": 0.04},
        {"beta": 0.1, "use_bias_correction_kl": False},
        {"delta": 1.5, "epsilon": 0.1},
    ],
    ids=str,
)
def test_grpo(kind: str, level: str, options: dict[str, Any]) -> None:
    data = batch()
    options = {"epsilon": 0.2, **options}
    if kind == "cispo":
        options["epsilon_high"] = 1.3
    if kind == "dr_grpo":
        options["max_completion_length"] = 14
    if kind == "dapo":
        options["num_items"] = 77
    ours = losses.grpo_loss(
        data["logprobs"],
        data["advantages"],
        data["mask"],
        old_logprobs=data["old"],
        ref_logprobs=data["ref"] if options.get("beta") else None,
        loss_type=kind,
        importance_sampling_level=level,
        **options,
    )
    same(ours, grpo_by_hand(data, kind, level, **options), data["logprobs"], data["mask"])


def test_grpo_defaults_and_on_policy() -> None:
    """Without old log-probabilities the ratios are 1, and the gradient is that of -A log pi."""
    data = batch()
    ours = losses.grpo_loss(data["logprobs"], data["advantages"], data["mask"])
    (gradient,) = torch.autograd.grad(ours, data["logprobs"])
    expected = -data["advantages"][:, None].expand(B, T) / data["mask"].sum()
    torch.testing.assert_close(gradient, expected.where(data["mask"], 0))
    with_defaults = losses.grpo_loss(
        data["logprobs"], data["advantages"][:, None].expand(B, T), data["mask"],
        loss_type="dapo", epsilon=0.2, beta=0.0, importance_sampling_level="token",
    )  # fmt: skip
    torch.testing.assert_close(ours, with_defaults, rtol=0, atol=0)


def test_grpo_entropy_bonus_and_nothing_to_count() -> None:
    data = batch()
    entropy = torch.rand(B, T, dtype=torch.float64, requires_grad=True)
    arguments = (data["logprobs"], data["advantages"])
    plain = losses.grpo_loss(*arguments, data["mask"])
    ours = losses.grpo_loss(*arguments, data["mask"], entropy=entropy, entropy_coef=0.3)
    torch.testing.assert_close(ours, plain - 0.3 * entropy[data["mask"]].mean())
    for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"):
        nothing = losses.grpo_loss(*arguments, torch.zeros(B, T), loss_type=kind)
        assert nothing == 0
        assert not torch.autograd.grad(nothing, data["logprobs"])[0].any()


def test_ppo() -> None:
    data = batch()
    advantages = torch.randn(B, T, dtype=torch.float64)
    ours = losses.ppo_loss(data["logprobs"], data["old"], advantages, data["mask"])
    terms = [
        -torch.minimum(r * advantages[i], r.clamp(0.8, 1.2) * advantages[i])
        for i in zip(*data["mask"].nonzero(as_tuple=True), strict=True)
        for r in [torch.exp(data["logprobs"][i] - data["old"][i])]
    ]
    same(ours, sum(terms) / len(terms), data["logprobs"], data["mask"])


def test_sequence_logprobs() -> None:
    data = batch()
    for average in (False, True):
        ours = losses.sequence_logprobs(data["logprobs"], data["mask"], average=average)
        for b in range(B):
            row = data["logprobs"][b][data["mask"][b]]
            torch.testing.assert_close(ours[b], row.sum() / (max(len(row), 1) if average else 1))


def pairs(count: int) -> list[Tensor]:
    return [-torch.rand(B, dtype=torch.float64) * 3 - 0.01 for _ in range(count)]


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "robust"])
def test_dpo(kind: str) -> None:
    chosen, rejected, ref_chosen, ref_rejected = pairs(4)
    chosen.requires_grad_()
    s = 0.1 if kind == "robust" else 0.0
    beta = 0.5
    ours = losses.dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, beta=beta, loss_type=kind, label_smoothing=s
    )
    m = (chosen - ref_chosen) - (rejected - ref_rejected)
    p = 1 / (1 + torch.exp(-beta * m))
    expected = {
        "sigmoid": -p.log(),
        "hinge": (1 - beta * m).clamp(min=0),
        "ipo": (m - 1 / (2 * beta)) ** 2,
        "robust": (-(1 - s) * p.log() + s * (1 - p).log()) / (1 - 2 * s),
    }[kind]
    same(ours, expected.mean(), chosen)


def test_pairs_without_reference() -> None:
    chosen, rejected = pairs(2)
    chosen.requires_grad_()
    nll = torch.tensor(1.7, dtype=torch.float64)

    def sigmoid(x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-x))

    simpo = -sigmoid(2.0 * (chosen - rejected) - 0.5).log().mean()
    same(losses.simpo_loss(chosen, rejected, beta=2.0), simpo, chosen)
    smoothed = -0.9 * sigmoid(0.1 * (chosen - rejected)).log()
    smoothed = smoothed - 0.1 * sigmoid(0.1 * (rejected - chosen)).log()
    ours = losses.cpo_loss(chosen, rejected, nll, label_smoothing=0.1)
    same(ours, smoothed.mean() + nll, chosen)
    p, q = chosen.exp(), rejected.exp()
    log_odds = (p / (1 - p)).log() - (q / (1 - q)).log()
    same(
        losses.orpo_loss(chosen, rejected, nll), nll - 0.1 * sigmoid(log_odds).log().mean(), chosen
    )


def test_orpo_near_certainty() -> None:
    """log(1 - p) keeps its digits and its gradient where p is nearly 1, and nearly 0."""
    chosen = torch.tensor([-1e-12, -800.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-1e-3, -1.0], dtype=torch.float64)
    loss = losses.orpo_loss(chosen, rejected, torch.zeros((), dtype=torch.float64))
    expected = [
        math.log(1e12) - (-1e-3 - math.log(-math.expm1(-1e-3))),
        -800 - math.log(1 / (math.e - 1)),
    ]
    by_hand = sum(0.1 * math.log1p(math.exp(-x)) if x > -30 else -0.1 * x for x in expected) / 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-9)
    assert torch.autograd.grad(loss, chosen)[0].isfinite().all()


def test_kto() -> None:
    logprobs, ref, kl, ref_kl = pairs(4)
    logprobs.requires_grad_()
    kl = kl.requires_grad_()
    desirable = torch.tensor([True, False, True, True, False])
    ours = losses.kto_loss(
        logprobs, ref, desirable, kl_logprobs=kl, ref_kl_logprobs=ref_kl, desirable_weight=1.3,
        undesirable_weight=0.7, reduction="none",
    )  # fmt: skip
    z = max(0.0, (kl - ref_kl).mean().item())
    expected = []
    for b in range(B):
        gain = logprobs[b] - ref[b] - z if desirable[b] else z - (logprobs[b] - ref[b])
        expected.append((1.3 if desirable[b] else 0.7) * (1 - 1 / (1 + torch.exp(-0.1 * gain))))
    same(ours.sum(), torch.stack(expected).sum(), logprobs)
    assert torch.autograd.grad(ours.sum(), kl, allow_unused=True)[0] is None


def heads(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(3, 4, 6, dtype=dtype, requires_grad=True),
        torch.randn(17, 6, dtype=dtype, requires_grad=True),
        torch.randn(17, dtype=dtype, requires_grad=True),
    )


def test_classification() -> None:
    x, w, b = heads()
    y = torch.randint(17, (3, 4))
    z = 1.5 * F.linear(x, w, b)
    lse, logp = z.logsumexp(-1), z.log_softmax(-1)
    picked = logp.gather(-1, y[..., None]).squeeze(-1)
    mean = losses.mean_logit(x, w, b, logit_scale=1.5)
    torch.testing.assert_close(mean, z.mean(-1))
    ours = losses.label_smoothed_cross_entropy(picked, lse, mean, label_smoothing=0.2)
    expected = F.cross_entropy(
        z.flatten(0, 1), y.flatten(), label_smoothing=0.2, reduction="none"
    ).view(3, 4)
    upstream = torch.randn(3, 4, dtype=torch.float64)
    for leaf in (x, w, b):
        same((ours * upstream).sum(), (expected * upstream).sum(), leaf)
    p = picked.exp()
    same(
        losses.focal_loss(picked, gamma=2.0, alpha=0.25).sum(),
        (-0.25 * (1 - p) ** 2 * p.log()).sum(),
        x,
    )
    torch.testing.assert_close(losses.z_loss(lse), 1e-4 * lse**2)
    certain = torch.zeros(1, dtype=torch.float64, requires_grad=True)  # p = 1
    assert torch.autograd.grad(losses.focal_loss(certain, gamma=0.5).sum(), certain)[0].isfinite()


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("chunk_size", [1, 5, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation(beta: float, chunk_size: int, temperature: float) -> None:
    x, w, b = heads()
    teacher_x, teacher_w = torch.randn(3, 4, 9).double(), torch.randn(17, 9).double()
    mask = torch.rand(3, 4) < 0.6
    ours = losses.linear_distillation_loss(
        x, w, teacher_x, teacher_w, mask, student_bias=b, beta=beta, temperature=temperature,
        chunk_size=chunk_size,
    )  # fmt: skip
    p = (F.linear(x, w, b) / temperature).softmax(-1)
    q = (teacher_x @ teacher_w.T / temperature).softmax(-1)
    m = beta * q + (1 - beta) * p

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).sum(-1)

    expected = {0.0: kl(q, p), 1.0: kl(p, q)}.get(beta)
    if expected is None:
        expected = beta * kl(q, m) + (1 - beta) * kl(p, m)
    for leaf in (x, w, b):
        same(ours * 2, expected[mask].sum() / mask.sum() * 2, leaf)
        ours = losses.linear_distillation_loss(
            x, w, teacher_x, teacher_w, mask, student_bias=b, beta=beta, temperature=temperature,
            memory_budget=4000,
        )  # fmt: skip


def test_distillation_of_the_impossible() -> None:
    """Classes that the teacher rules out (-inf) and tokens that do not count add nothing."""
    x, w, b = heads()
    teacher_b = torch.zeros(17, dtype=torch.float64)
    teacher_b[3] = -torch.inf
    teacher_x, teacher_w = torch.randn(3, 4, 9).double(), torch.randn(17, 9).double()
    ours = losses.linear_distillation_loss(
        x, w, teacher_x, teacher_w, student_bias=b, teacher_bias=teacher_b, beta=0.0
    )
    q = (teacher_x @ teacher_w.T + teacher_b).log_softmax(-1)
    expected = F.kl_div(F.linear(x, w, b).log_softmax(-1), q.exp(), reduction="none")
    same(ours, expected.sum(-1).mean(), x)
    nothing = losses.linear_distillation_loss(x, w, teacher_x, teacher_w, torch.zeros(3, 4))
    assert nothing == 0 and not torch.autograd.grad(nothing, x)[0].any()


@pytest.mark.parametrize("add_tail", [False, True])
def test_top_k_distillation(add_tail: bool) -> None:
    x, w, b = heads()
    log_p = F.linear(x, w, b).log_softmax(-1)
    teacher = torch.randn(3, 4, 17, dtype=torch.float64).log_softmax(-1).topk(5)
    mask = torch.rand(3, 4) < 0.6
    ours = losses.top_k_distillation_loss(
        log_p.gather(-1, teacher.indices), teacher.values, mask, add_tail=add_tail
    )
    terms = []
    for i in zip(*mask.nonzero(as_tuple=True), strict=True):
        q, p = teacher.values[i].exp(), log_p[i][teacher.indices[i]].exp()
        term = (q * (q / p).log()).sum()
        if add_tail:
            term = term + (1 - q.sum()) * ((1 - q.sum()) / (1 - p.sum())).log()
        terms.append(term)
    same(ours, sum(terms) / len(terms), x)


def test_argument_errors() -> None:
    data = batch()
    x = data["logprobs"]
    with pytest.raises(ValueError, match="loss_type is 'ppo'"):
        losses.grpo_loss(x, data["advantages"], data["mask"], loss_type="ppo")
    with pytest.raises(ValueError, match=r"ref_logprobs is None.*beta is 0.1"):
        losses.grpo_loss(x, data["advantages"], data["mask"], beta=0.1)
    with pytest.raises(RuntimeError, match=r"advantages has shape \(9,\)"):
        losses.grpo_loss(x, torch.zeros(T), data["mask"])
    with pytest.raises(RuntimeError, match="mask has shape"):
        losses.ppo_loss(x, x, x, data["mask"][:2])
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.5"):
        losses.dpo_loss(x, x, x, x, loss_type="robust", label_smoothing=0.5)
    with pytest.raises(ValueError, match="beta is 2"):
        losses.linear_distillation_loss(*heads()[:2], *heads()[:2], beta=2)
    with pytest.raises(RuntimeError, match="17 classes"):
        losses.linear_distillation_loss(*heads()[:2], heads()[0], torch.zeros(5, 6))
    assert memeff.losses is losses


@pytest.mark.parametrize("kind", ["grpo", "dapo", "cispo"])
def test_from_hidden_states_to_gradients(kind: str) -> None:
    """The same loss by statistics, by rows of logits in chunks, and on full logits."""
    x, w, b = heads()
    ids = torch.randint(17, (3, 4))
    mask = torch.rand(3, 4) < 0.7
    advantages = torch.randn(3, dtype=torch.float64)
    old = -torch.rand(3, 4, dtype=torch.float64)

    def loss_of(logprobs: Tensor) -> Tensor:
        return losses.grpo_loss(
            logprobs, advantages, mask, old_logprobs=old, ref_logprobs=old, loss_type=kind,
            beta=0.1, epsilon_high=1.3 if kind == "cispo" else None,
        )  # fmt: skip

    def pick(z: Tensor, y: Tensor) -> Tensor:
        return z.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)

    labels = ids.masked_fill(~mask, -100)
    by_statistics = loss_of(memeff.linear_logprobs(x, w, labels, linear_bias=b))
    by_rows = loss_of(memeff.chunked_linear_apply(pick, x, w, ids, linear_bias=b, chunk_size=5))
    full = loss_of(pick(F.linear(x, w, b), ids))
    for leaf in (x, w, b):
        same(by_statistics, full, leaf)
        same(by_rows, full, leaf)


@pytest.mark.parametrize("kind", ["focal", "smoothed", "dpo"])
def test_losses_through_statistics(kind: str) -> None:
    x, w, b = heads()
    ids = torch.randint(17, (3, 4))
    mask = torch.ones(3, 4)

    def loss_of(logprob: Tensor, lse: Tensor, mean: Tensor) -> Tensor:
        if kind == "focal":
            return losses.focal_loss(logprob).sum() + losses.z_loss(lse, coefficient=0.1).sum()
        if kind == "smoothed":
            return losses.label_smoothed_cross_entropy(logprob, lse, mean).sum()
        sequences = losses.sequence_logprobs(logprob, mask)
        return losses.dpo_loss(*sequences[:2], *sequences.detach()[1:], beta=0.3)

    statistics = memeff.linear_token_statistics(x, w, ids, linear_bias=b, softcap=None)
    assert statistics.logprob is not None
    ours = loss_of(statistics.logprob, statistics.lse, losses.mean_logit(x, w, b))
    z = F.linear(x, w, b)
    logprob = z.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    expected = loss_of(logprob, z.logsumexp(-1), z.mean(-1))
    for leaf in (x, w, b):
        same(ours, expected, leaf)
