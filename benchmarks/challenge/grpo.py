"""GRPO: against the paper's formula, against TRL's own loss method, and its time."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import memeff
from challenge.correctness import gradients
from challenge.functions import Problem
from challenge.memory import step
from challenge.report import Row, row
from memeff.bench.environment import installed_version
from memeff.bench.timing import time_interleaved


def grpo_problem() -> dict[str, Tensor]:
    torch.manual_seed(0)
    batch, length, features, vocab = 6, 24, 48, 500
    mask = torch.ones(batch, length)
    for i in range(batch):
        mask[i, torch.randint(1, length + 1, ()) :] = 0
    w = torch.randn(vocab, features, dtype=torch.float64) * 0.3
    x = torch.randn(batch, length, features, dtype=torch.float64)
    ids = torch.randint(vocab, (batch, length))
    exact = F.linear(x, w).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    return {
        "x": x, "w": w, "ids": ids, "mask": mask, "advantages": torch.randn(batch).double(),
        "old": exact + 0.4 * torch.randn(batch, length),
        "ref": exact + 0.2 * torch.randn(batch, length),
    }  # fmt: skip


def grpo_by_the_paper(d: dict[str, Tensor], logprobs: Tensor) -> Tensor:
    """Shao et al. 2024, eq. 3 and 4, sequence by sequence."""
    total = logprobs.new_zeros(())
    for i in range(len(logprobs)):
        positions = d["mask"][i].bool()
        ratio = (logprobs[i] - d["old"][i])[positions].exp()
        a = d["advantages"][i]
        surrogate = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        d_ref = (d["ref"][i] - logprobs[i])[positions]
        total = total + (surrogate - 0.04 * (d_ref.exp() - d_ref - 1)).mean()
    return -total / len(logprobs)


def grpo_by_trl(d: dict[str, Tensor], logprobs: Tensor, loss_type: str, level: str) -> Tensor:
    """TRL's own loss method, on a stand-in for its trainer that hands out these logprobs."""
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir="unused", loss_type=loss_type, beta=0.04, importance_sampling_level=level,
        use_cpu=True, bf16=False, epsilon_high=1.3 if loss_type == "cispo" else None,
    )  # fmt: skip
    stand_in = SimpleNamespace(
        args=args, beta=args.beta, loss_type=args.loss_type, epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        importance_sampling_level=args.importance_sampling_level, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, current_gradient_accumulation_steps=1,
        max_completion_length=logprobs.shape[1], aux_loss_enabled=False, use_liger_kernel=False,
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda t: t, reduce=lambda t, reduction: t
        ),
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            logprobs, torch.zeros_like(logprobs), None,
        ),
    )  # fmt: skip
    model = SimpleNamespace(training=False)
    inputs = {
        "prompt_ids": d["ids"][:, :1], "prompt_mask": d["mask"][:, :1], "completion_ids": d["ids"],
        "completion_mask": d["mask"], "advantages": d["advantages"],
        "old_per_token_logps": d["old"], "ref_per_token_logps": d["ref"],
        "num_items_in_batch": d["mask"].sum(),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(stand_in, model, inputs)


def grpo(arguments: argparse.Namespace) -> list[Row]:
    d = grpo_problem()

    def ours(kind: str, level: str, **options: Any) -> list[Tensor]:
        x, w = (d[name].clone().requires_grad_() for name in "xw")
        logprobs = memeff.linear_logprobs(x, w, d["ids"].masked_fill(d["mask"] == 0, -100))
        loss = memeff.losses.grpo_loss(
            logprobs, d["advantages"], d["mask"], old_logprobs=d["old"], ref_logprobs=d["ref"],
            loss_type=kind, beta=0.04, importance_sampling_level=level,
            epsilon_high=1.3 if kind == "cispo" else None, **options,
        )  # fmt: skip
        return gradients(loss, [x, w])

    def standard(loss_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x, w = (d[name].clone().requires_grad_() for name in "xw")
        logprobs = F.linear(x, w).log_softmax(-1).gather(-1, d["ids"][..., None]).squeeze(-1)
        return gradients(loss_of(logprobs), [x, w])

    def difference(a: list[Tensor], b: list[Tensor]) -> float:
        return max(((p - q).norm() / q.norm()).item() for p, q in zip(a, b, strict=True))

    mine = ours("grpo", "token", use_bias_correction_kl=False)
    worst = difference(mine, standard(lambda lp: grpo_by_the_paper(d, lp)))
    rows = [
        row(
            "GRPO matches the paper's formula on full logits",
            worst <= 1e-9,
            f"loss and gradients in float64, largest relative difference {worst:.1e}",
            worst=worst,
        )
    ]
    version = installed_version("trl")
    name = "GRPO family matches TRL's loss and gradients"
    if version is None:
        return [*rows, row(name, None, "trl is not installed")]
    differences = {}
    for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"):
        for level in ("token", "sequence"):
            theirs = standard(lambda lp, k=kind, v=level: grpo_by_trl(d, lp, k, v))
            differences[f"{kind}/{level}"] = difference(ours(kind, level), theirs)
    worst_name = max(differences, key=lambda key: differences[key])
    worst = differences[worst_name]
    figures = f"trl {version}, {len(differences)} variants, at most {worst:.1e} ({worst_name})"
    return [*rows, row(name, worst <= 1e-9, figures, worst=worst)]


def grpo_time(arguments: argparse.Namespace) -> list[Row]:
    """GRPO of 4 x 512 tokens over 128K classes, in terms of its bare matrix products."""
    tokens, features, vocab = 2048, arguments.features, 131072
    p = Problem([tokens, features, vocab], bias=False, device=arguments.device)
    x, w = p.x.detach(), p.linear.weight.detach()
    block = torch.empty(256, vocab, dtype=x.dtype, device=x.device)
    dx, dw = torch.empty_like(x), torch.empty_like(w)
    dz = torch.randn(tokens, 4096, device=x.device).to(x.dtype)

    def products(logits: int) -> None:
        """Logits by blocks of tokens, once or twice; dX and dW by slices of the vocabulary."""
        for _ in range(logits):
            for begin in range(0, tokens, 256):
                torch.mm(x[begin : begin + 256], w.t(), out=block)
        for begin in range(0, vocab, 4096):
            torch.mm(dz, w[begin : begin + 4096], out=dx)
            torch.mm(dz.t(), x, out=dw[begin : begin + 4096])

    def ours(variant: str) -> None:
        p.x.grad = p.linear.weight.grad = None
        step(variant, p, None)

    calls: dict[str, Callable[[], None]] = {
        "6 NDV": lambda: products(1), "8 NDV": lambda: products(2),
        "linear_loss": lambda: ours("linear_loss"), "linear_logprobs": lambda: ours("grpo"),
    }  # fmt: skip
    for call in calls.values():
        call()
    candidates = {name: (call, lambda: None) for name, call in calls.items()}
    times = time_interleaved(candidates, arguments.rounds, torch.device(arguments.device))
    rows = []
    for variant, floor in (("linear_logprobs", "8 NDV"), ("linear_loss", "6 NDV")):
        seconds, products_seconds = times[variant].median, times[floor].median
        ratio = seconds / products_seconds
        rows.append(
            row(
                f"GRPO by {variant}, 4 x 512 tokens, V = 128K: < 1.15 x its bare products, {floor}",
                ratio < 1.15,
                f"{ratio:.2f} x: {seconds:.2f} s, products {products_seconds:.2f} s, "
                f"D = {features}, median of {arguments.rounds} rounds",
                ratio=ratio,
            )
        )
    return rows
