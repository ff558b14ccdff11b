"""The GRPO family against TRL's own loss method over full logits, in float64."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import memeff

trl = pytest.importorskip("trl")

BATCH, LENGTH, FEATURES, VOCAB = 6, 24, 48, 500


@pytest.fixture
def data() -> dict[str, Tensor]:
    mask = (torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (BATCH, 1))).double()
    x = torch.randn(BATCH, LENGTH, FEATURES, dtype=torch.float64)
    w = torch.randn(VOCAB, FEATURES, dtype=torch.float64) * 0.3
    ids = torch.randint(VOCAB, (BATCH, LENGTH))
    exact = full_logprobs(x, w, ids)
    return {
        "x": x, "w": w, "ids": ids, "mask": mask, "advantages": torch.randn(BATCH).double(),
        "old": exact + 0.4 * torch.randn(BATCH, LENGTH),
        "ref": exact + 0.2 * torch.randn(BATCH, LENGTH),
    }  # fmt: skip


def full_logprobs(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    return F.linear(x, w).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


def loss_of_trl(d: dict[str, Tensor], logprobs: Tensor, loss_type: str, level: str) -> Tensor:
    """TRL's method, on a stand-in for its trainer that hands out these log-probabilities."""
    args = trl.GRPOConfig(
        output_dir="unused", loss_type=loss_type, beta=0.04, importance_sampling_level=level,
        use_cpu=True, bf16=False, epsilon_high=1.3 if loss_type == "cispo" else None,
    )  # fmt: skip
    trainer = SimpleNamespace(
        args=args, beta=args.beta, loss_type=args.loss_type, epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        importance_sampling_level=args.importance_sampling_level, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, current_gradient_accumulation_steps=1,
        max_completion_length=LENGTH, aux_loss_enabled=False, use_liger_kernel=False,
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda t: t, reduce=lambda t, reduction: t
        ),
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            logprobs, torch.zeros_like(logprobs), None,
        ),
    )  # fmt: skip
    inputs = {
        "prompt_ids": d["ids"][:, :1], "prompt_mask": d["mask"][:, :1], "completion_ids": d["ids"],
        "completion_mask": d["mask"], "advantages": d["advantages"],
        "old_per_token_logps": d["old"], "ref_per_token_logps": d["ref"],
        "num_items_in_batch": d["mask"].sum(),
    }  # fmt: skip
    return trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
def test_grpo(data: dict[str, Tensor], loss_type: str, level: str) -> None:
    def run(loss_of: Any) -> list[Tensor]:
        x, w = (data[name].clone().requires_grad_() for name in "xw")
        loss = loss_of(x, w)
        return [loss.detach(), *torch.autograd.grad(loss * 1.5, [x, w])]

    def ours(x: Tensor, w: Tensor) -> Tensor:
        labels = data["ids"].masked_fill(data["mask"] == 0, -100)
        return memeff.losses.grpo_loss(
            memeff.linear_logprobs(x, w, labels), data["advantages"], data["mask"],
            old_logprobs=data["old"], ref_logprobs=data["ref"], loss_type=loss_type, beta=0.04,
            importance_sampling_level=level, epsilon_high=1.3 if loss_type == "cispo" else None,
        )  # fmt: skip

    def theirs(x: Tensor, w: Tensor) -> Tensor:
        return loss_of_trl(data, full_logprobs(x, w, data["ids"]), loss_type, level)

    for mine, expected in zip(run(ours), run(theirs), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
