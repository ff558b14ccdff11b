"""The same numbers from TRL's own trainers, where their losses can be called without a model."""

from __future__ import annotations

import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from loss_cases import B, T, assert_same, heads, pairs
from torch import Tensor

from memeff import losses

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="needs TRL: pip install trl")


def grpo_of_trl(data: dict[str, Tensor], **options: Any) -> Tensor:
    """The loss of GRPOTrainer from given log-probabilities."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    trainer = MagicMock()
    trainer._get_per_token_logps_and_entropies.return_value = (data["x"], data["entropy"], None)
    trainer.aux_loss_enabled = trainer.use_adaptive_entropy = False
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold = 1.0, None
    trainer.importance_sampling_level = options.get("importance_sampling_level", "token")
    trainer.beta, trainer.loss_type = options.get("beta", 0.0), options["loss_type"]
    trainer.epsilon_low = options.get("epsilon", 0.2)
    trainer.epsilon_high = options.get("epsilon_high") or trainer.epsilon_low
    trainer.args = SimpleNamespace(
        use_bias_correction_kl=options.get("use_bias_correction_kl", True),
        delta=options.get("delta"),
    )
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    trainer.model.training = False
    trainer.max_completion_length = 14
    trainer.accelerator = MagicMock(num_processes=1)
    trainer.accelerator.gather.side_effect = lambda values: values
    trainer._entropy_bonus_enabled = options.get("entropy_coef", 0.0) != 0
    trainer.entropy_coef = options.get("entropy_coef", 0.0)
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    inputs = {
        "prompt_ids": torch.zeros(B, 1), "prompt_mask": torch.ones(B, 1),
        "completion_ids": torch.zeros(B, T), "completion_mask": data["mask"].double(),
        "advantages": data["advantages"], "old_per_token_logps": data["old"],
        "ref_per_token_logps": data["ref"], "num_items_in_batch": torch.tensor(17.0).double(),
        "importance_sampling_ratio": data["importance_weights"],
    }  # fmt: skip
    loss: Tensor = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.04, "epsilon_high": 0.28, "entropy_coef": 0.1},
        {"beta": 0.1, "use_bias_correction_kl": False, "delta": 1.5, "epsilon": 0.1},
    ],
    ids=str,
)
def test_grpo(loss_type: str, level: str, options: dict[str, Any]) -> None:
    x = -torch.rand(B, T, dtype=torch.float64) * 3
    data = {
        "x": x.requires_grad_(),
        "old": x.detach() + 0.3 * torch.randn(B, T),
        "ref": x.detach() + 0.3 * torch.randn(B, T),
        "entropy": torch.rand(B, T, dtype=torch.float64),
        "importance_weights": torch.rand(B, T, dtype=torch.float64) * 2,
        "advantages": torch.randn(B, dtype=torch.float64),
        "mask": torch.rand(B, T) < 0.7,
    }
    data["mask"][:, 0] = True
    options = {"loss_type": loss_type, "importance_sampling_level": level, **options}
    ours = losses.grpo_loss(
        x, data["advantages"], data["mask"], old_logprobs=data["old"], ref_logprobs=data["ref"],
        importance_weights=data["importance_weights"], entropy=data["entropy"], num_items=17,
        max_completion_length=14, **options,
    )  # fmt: skip
    assert_same(ours, grpo_of_trl(data, **options), x, data["mask"])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cpo_and_simpo(label_smoothing: float) -> None:
    cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    chosen, rejected = pairs(2)
    chosen.requires_grad_()
    accelerator = SimpleNamespace(device="cpu")
    for loss_type, beta in (("sigmoid", 0.1), ("simpo", 2.0)):
        trainer = SimpleNamespace(
            alpha=0.0, accelerator=accelerator, loss_type=loss_type, simpo_gamma=0.5, beta=beta,
            label_smoothing=label_smoothing,
        )  # fmt: skip
        expected = cpo_trainer.CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].mean()
        if loss_type == "simpo":
            ours = losses.simpo_loss(chosen, rejected, beta=beta, label_smoothing=label_smoothing)
        else:
            nothing = torch.zeros((), dtype=torch.float64)
            ours = losses.cpo_loss(chosen, rejected, nothing, label_smoothing=label_smoothing)
        assert_same(ours, expected, chosen)


def test_orpo() -> None:
    orpo_trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    chosen, rejected = (values.float() for values in pairs(2))  # TRL rounds to float32
    chosen.requires_grad_()
    trainer = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    terms = orpo_trainer.ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    nll = torch.tensor(1.7)
    assert_same(losses.orpo_loss(chosen, rejected, nll), nll - terms.mean(), chosen)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_items", [None, 7])
def test_distillation(beta: float, num_items: int | None) -> None:
    gkd_trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    x, w, b = heads()
    teacher_x, teacher_w = torch.randn(3, 4, 9).double(), torch.randn(17, 9).double()
    mask = torch.rand(3, 4) < 0.6
    ours = losses.linear_distillation_loss(
        x, w, teacher_x, teacher_w, mask, student_bias=b, beta=beta, temperature=1.5,
        num_items=num_items,
    )  # fmt: skip
    expected = gkd_trainer.GKDTrainer.generalized_jsd_loss(
        F.linear(x, w, b), teacher_x @ teacher_w.T, mask.long() - 100, beta=beta, temperature=1.5,
        num_items_in_batch=num_items,
    )  # fmt: skip
    for leaf in (x, w, b):
        assert_same(ours, expected, leaf)
