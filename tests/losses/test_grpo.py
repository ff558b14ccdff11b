"""The GRPO family against the papers' formulas, written out token by token in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import B, T, assert_same, batch
from torch import Tensor

from memeff import losses


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
    assert_same(ours, grpo_by_hand(data, kind, level, **options), data["logprobs"], data["mask"])


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
