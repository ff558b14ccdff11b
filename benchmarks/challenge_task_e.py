"""The challenge's marking scheme, one criterion after the other, with figures.

    python benchmarks/challenge_task_e.py                     sizes for a small machine
    python benchmarks/challenge_task_e.py --only grpo,llama   some of them
    python benchmarks/challenge_task_e.py --json results.json

The challenge: a loss over logits that come from a projection, as a torch.autograd.Function, without
the memory of the logits; the user's function maps (hidden chunk, linear, labels chunk) to a small
tensor and upcasts with .float(); nothing about its derivatives is hard-coded.

Peaks are measured in processes of their own. "error" is the relative error against float64, beside
that of the standard way in the same dtype.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import memeff
from memeff import MemoryEfficientLinear
from memeff.bench.environment import describe_environment, installed_version
from memeff.bench.isolated import call_isolated
from memeff.bench.memory import PeakMemory
from memeff.bench.timing import time_interleaved

Row = dict[str, Any]
MIB = 2**20


def row(criterion: str, passed: bool | None, figures: str, **numbers: Any) -> Row:
    """`passed` is None for what could not be measured here."""
    return {"criterion": criterion, "passed": passed, "figures": figures, **numbers}


# The user's functions, as the challenge writes them.


def cross_entropy(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
    logits = linear(hidden).float()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))


def focal(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
    log_p = linear(hidden).float().log_softmax(-1).gather(-1, labels[:, None])
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


def squared_error(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
    logits = linear(hidden).float()
    return (logits - F.one_hot(labels, logits.shape[-1])).square().mean(-1).mean()


def smoothed(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(linear(hidden).float(), labels, label_smoothing=0.1)


def divergence(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
    """KL from a Zipf distribution over the classes, rotated by the label."""
    log_p = linear(hidden).float().log_softmax(-1)
    vocab = log_p.shape[-1]
    ranks = (torch.arange(vocab, device=labels.device) + labels[:, None]) % vocab + 1
    q = (1 / ranks.float()).softmax(-1)
    return F.kl_div(log_p, q, reduction="none").sum(-1).mean()


def random_function(seed: int) -> Callable[[Tensor, Any, Tensor], Tensor]:
    """A random composition of differentiable operations, unknown to the library."""
    rng = random.Random(seed)
    steps: list[Callable[[Tensor], Tensor]] = [
        torch.tanh, torch.sin, F.softplus, torch.atan, lambda t: t.log_softmax(-1),
        lambda t: t * t.sigmoid(), lambda t: t - t.mean(-1, keepdim=True),
    ]  # fmt: skip
    chosen = [(rng.choice(steps), rng.uniform(-2, 2)) for _ in range(4)]

    def function(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
        z = linear(hidden).float()
        total = torch.zeros_like(z)
        for step, weight in chosen:
            z = step(z)
            total = total + weight * z
        return (total * (labels[:, None] % 7 + 1)).square().mean(-1).mean()

    return function


class Problem:
    def __init__(self, shape: list[int], bias: bool = True, device: str = "cpu") -> None:
        tokens, features, vocab = shape
        torch.manual_seed(0)
        self.x = torch.randn(tokens, features, device=device).bfloat16().requires_grad_()
        self.linear = torch.nn.Linear(features, vocab, bias=bias, device=device)
        torch.nn.init.normal_(self.linear.weight, std=2 / features**0.5)
        self.linear = self.linear.bfloat16()
        self.labels = torch.randint(vocab, (tokens,), device=device)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *self.linear.parameters()]


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * 1.5, leaves)]


def compare(
    function: Callable[..., Tensor], shape: list[int], chunk_size: int | None
) -> tuple[bool, str]:
    """Errors of loss, dX, dW, db against float64 (in float64, .float() keeps the upcast out)."""
    p = Problem(shape)
    w, b = p.linear.weight, p.linear.bias
    loss = MemoryEfficientLinear.apply(p.x, w, p.labels, function, b, "mean", chunk_size)
    ours = gradients(loss, p.leaves)
    standard = gradients(function(p.x, p.linear, p.labels), p.leaves)
    exact_leaves = [t.detach().double().requires_grad_() for t in p.leaves]

    class Exact(torch.Tensor):
        """float64 logits whose .float() is themselves."""

        def float(self) -> Tensor:  # type: ignore[override]
            return self.as_subclass(Tensor)

    def linear(hidden: Tensor) -> Tensor:
        return F.linear(hidden, *exact_leaves[1:]).as_subclass(Exact)

    exact = gradients(function(exact_leaves[0], linear, p.labels), exact_leaves)

    def errors(results: list[Tensor]) -> list[float]:
        return [
            ((a.double() - e).norm() / e.norm()).item() for a, e in zip(results, exact, strict=True)
        ]

    mine, theirs = errors(ours), errors(standard)
    epsilons = [2**-23, *[2**-8] * 3]
    passed = all(a <= 1.1 * s + eps / 4 for a, s, eps in zip(mine, theirs, epsilons, strict=True))
    names = ("loss", "dX", "dW", "db")
    text = ", ".join(f"{n} {a:.1e} ({s:.1e})" for n, a, s in zip(names, mine, theirs, strict=True))
    return passed, f"errors (standard's): {text}"


# Peak memory and time.


def peak_of(variant: str, shape: list[int], budget: int, device: str) -> dict[str, float]:
    """Peak bytes over the inputs and seconds of one step; a process of its own."""
    step(variant, Problem([32, shape[1], 512], device=device), budget)  # warm-up
    p = Problem(shape, device=device)
    with PeakMemory(device) as peak:
        step(variant, p, budget)
    floor = sum(t.numel() * t.element_size() for t in p.leaves)
    return {"peak": peak.extra_bytes, "floor": floor}


def step(variant: str, p: Problem, budget: int | None) -> None:
    w, b = p.linear.weight, p.linear.bias
    tokens, vocab = len(p.x), len(w)
    lead = (4, tokens // 4)
    if variant == "standard":
        cross_entropy(p.x, p.linear, p.labels).backward()
    elif variant == "MemoryEfficientLinear":
        chunk = None if budget is None else max(16, budget // (16 * vocab))
        MemoryEfficientLinear.apply(p.x, w, p.labels, cross_entropy, b, "mean", chunk).backward()
    elif variant == "linear_cross_entropy":
        options = {"linear_bias": b, "memory_budget": budget}
        memeff.linear_cross_entropy(p.x, w, p.labels, **options).backward()
    elif variant == "linear_loss":
        old, advantages = torch.full((tokens,), -9.0), torch.linspace(-1, 1, tokens)
        memeff.linear_loss(p.x, w, p.labels, dapo_of_tokens, old, advantages).backward()
    else:
        x, y = p.x.view(*lead, -1), p.labels.view(lead)
        logprobs = memeff.linear_logprobs(x, w, y, linear_bias=b, memory_budget=budget)
        rl_loss(variant, logprobs).backward()


def dapo_of_tokens(statistics: Any, old: Tensor, advantages: Tensor) -> Tensor:
    ratio = (statistics.logprob - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def rl_loss(name: str, logprobs: Tensor) -> Tensor:
    mask = torch.ones_like(logprobs)
    old = logprobs.detach() - 0.1
    chosen = memeff.losses.sequence_logprobs(logprobs, mask, average=True)
    a, b = chosen[:2], chosen[2:]
    if name in ("grpo", "dr_grpo", "dapo", "cispo"):
        advantages = torch.linspace(-1, 1, 4, device=logprobs.device)
        return memeff.losses.grpo_loss(
            logprobs, advantages, mask, old_logprobs=old, loss_type=name, beta=0.04,
            ref_logprobs=old,
        )  # fmt: skip
    return {
        "ppo": lambda: memeff.losses.ppo_loss(logprobs, old, torch.ones_like(old), mask),
        "dpo": lambda: memeff.losses.dpo_loss(a, b, a.detach() - 0.1, b.detach()),
        "simpo": lambda: memeff.losses.simpo_loss(a, b),
        "orpo": lambda: memeff.losses.orpo_loss(a, b, -a.mean()),
        "kto": lambda: memeff.losses.kto_loss(chosen, chosen.detach() - 0.1, chosen > -9),
    }[name]()


def memory(arguments: argparse.Namespace) -> list[Row]:
    shape, budget = arguments.shape, arguments.budget * MIB
    peaks = {
        name: call_isolated(
            peak_of, variant=name, shape=shape, budget=budget, device=arguments.device
        )
        for name in ("standard", "MemoryEfficientLinear", "linear_cross_entropy")
    }
    standard = peaks["standard"]["peak"]
    rows = []
    for name in ("MemoryEfficientLinear", "linear_cross_entropy"):
        cut = 1 - peaks[name]["peak"] / standard
        rows.append(
            row(
                f"memory cut by {name} >= 50 % (aim 95 %)",
                cut >= 0.5,
                f"{cut:.1%}: {peaks[name]['peak'] / MIB:.0f} of {standard / MIB:.0f} MiB, of which "
                f"the gradients take {peaks[name]['floor'] / MIB:.0f}",
                cut=cut,
            )
        )
    return rows


def rl_memory(arguments: argparse.Namespace) -> list[Row]:
    shape, budget = arguments.shape, arguments.budget * MIB
    names = ["linear_cross_entropy", "grpo", "dr_grpo", "dapo", "cispo", "ppo", "dpo", "simpo",
             "orpo", "kto"]  # fmt: skip
    peaks = {
        n: call_isolated(peak_of, variant=n, shape=shape, budget=budget, device=arguments.device)
        for n in names
    }
    base = peaks.pop("linear_cross_entropy")["peak"]
    worst = max(peaks, key=lambda name: peaks[name]["peak"])
    ratio = peaks[worst]["peak"] / base
    listed = ", ".join(f"{name} {peak['peak'] / MIB:.1f}" for name, peak in peaks.items())
    return [
        row(
            "peak memory of RL losses <= 1.05 x linear_cross_entropy's, same budget",
            ratio <= 1.05,
            f"at most {ratio:.3f} x ({worst}); {base / MIB:.1f} MiB; {listed}",
            ratio=ratio,
        )
    ]


# Correctness.


def correctness(arguments: argparse.Namespace) -> list[Row]:
    shape = [300, 96, 2000]
    seen = []

    def spy(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
        logits = linear(hidden).float()
        seen.append(logits.dtype)
        return F.cross_entropy(logits, labels)

    passed, text = compare(spy, shape, 64)
    kept = all(dtype in (torch.float32, torch.float64) for dtype in seen)
    rows = [row("float32 upcast kept", kept and passed, f"logits in float32; {text}")]
    functions = {
        "cross entropy": cross_entropy, "focal": focal, "MSE on logits": squared_error,
        "label smoothing": smoothed, "KL divergence": divergence,
    }  # fmt: skip
    for name, function in functions.items():
        rows.append(row(f"{name} matches", *compare(function, shape, 64)))
    seeds = [random.randrange(10**6) for _ in range(5)]
    results = [compare(random_function(seed), shape, 64) for seed in seeds]
    passed = all(good for good, _ in results)
    rows.append(row("gradients not hard-coded", passed, f"5 random functions, seeds {seeds}"))
    sizes = [1, 7, 97, 300, 1000]
    results = [compare(cross_entropy, shape, size) for size in sizes]
    rows.append(
        row("chunk sizes are dynamic", all(good for good, _ in results), f"sizes {sizes} of 300")
    )
    return rows


# Llama.


def llama(arguments: argparse.Namespace) -> list[Row]:
    name = "Llama-1B layout: training losses match"
    if installed_version("transformers") is None:
        return [row(name, None, "transformers is not installed")]
    from transformers import LlamaConfig, LlamaForCausalLM

    from memeff.bench.corpus import Vocabulary, standard_library_text

    # Llama 3.2 1B: 16 layers, 2048 wide, 32 heads of which 8 for keys, 8192, 128256. Shrunk.
    config = LlamaConfig(
        vocab_size=8192, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, rope_theta=500000.0, tie_word_embeddings=True,
        max_position_embeddings=512,
    )  # fmt: skip
    text = standard_library_text(400_000)
    vocabulary = Vocabulary(text, config.vocab_size)
    tokens = vocabulary.encode(text) % config.vocab_size
    steps, batch, length = arguments.steps, 4, 64
    batches = tokens[: steps * batch * length].view(steps, batch, length)

    def train(loss_of: Callable[[Any, Tensor], Tensor]) -> Tensor:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for ids in batches:
            loss = loss_of(model, ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def standard(model: Any, ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    def function(model: Any, ids: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        weight = model.lm_head.weight
        return MemoryEfficientLinear.apply(
            hidden, weight, ids[:, 1:].contiguous(), cross_entropy, None, "mean", 37
        )

    def fused(model: Any, ids: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids).last_hidden_state
        return memeff.linear_cross_entropy(hidden, model.lm_head.weight, ids, shift=True)

    expected = train(standard)
    rows = []
    for variant, loss_of in (("MemoryEfficientLinear", function), ("linear_cross_entropy", fused)):
        losses = train(loss_of)
        worst = (losses - expected).abs().max().item()
        rows.append(
            row(
                f"{name} ({variant})",
                worst <= 1e-3,
                f"{steps} steps in float32, largest difference {worst:.1e}, loss from "
                f"{expected[0]:.3f} to {expected[-1]:.3f}",
                worst=worst,
            )
        )
    return rows


# GRPO.


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


def original_table(arguments: argparse.Namespace) -> list[Row]:
    """64 x 512 tokens, D 768, V 32000, bfloat16, bias. The standard way on a T4: 3.2 s, 8.0 GiB."""
    shape = [64 * 512, 768, 32000]
    results = {}
    for name in ("standard", "MemoryEfficientLinear", "linear_cross_entropy"):
        results[name] = call_isolated(
            timed_peak, variant=name, shape=shape, budget=128 * MIB, device=arguments.device
        )
    listed = "; ".join(
        f"{name} {r['seconds']:.2f} s, {r['peak'] / 2**30:.3f} GiB" for name, r in results.items()
    )
    cut = 1 - results["MemoryEfficientLinear"]["peak"] / results["standard"]["peak"]
    return [row("the original table's shape", cut >= 0.5, listed, **results)]


def timed_peak(variant: str, shape: list[int], budget: int, device: str) -> dict[str, float]:
    """Peak of one step, then the fastest of three more."""
    measured = peak_of(variant, shape, budget, device)
    p = Problem(shape, device=device)

    def call() -> None:
        for leaf in p.leaves:
            leaf.grad = None
        step(variant, p, budget)

    times = time_interleaved({variant: (call, lambda: None)}, 3, torch.device(device))
    return {**measured, "seconds": min(times[variant].seconds)}


SECTIONS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "memory": memory,
    "correctness": correctness,
    "llama": llama,
    "grpo": grpo,
    "rl_memory": rl_memory,
    "grpo_time": grpo_time,
    "original_table": original_table,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(SECTIONS)}")
    parser.add_argument("--shape", default="4096,512,32768", help="of the memory criteria: N,D,V")
    parser.add_argument("--budget", type=int, default=32, help="MiB of workspace (default 32)")
    parser.add_argument("--steps", type=int, default=60, help="training steps (default 60)")
    parser.add_argument("--features", type=int, default=1024, help="D of grpo_time (default 1024)")
    parser.add_argument("--rounds", type=int, default=3, help="of grpo_time (default 3)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    arguments.shape = [int(size) for size in arguments.shape.split(",")]
    chosen = list(SECTIONS) if arguments.only is None else arguments.only.split(",")
    for name in chosen:
        if name not in SECTIONS:
            parser.error(f"--only has {name!r}, expected some of {', '.join(SECTIONS)}")
    results = []
    for name in chosen:
        for result in SECTIONS[name](arguments):
            verdict = {True: "pass", False: "FAIL", None: "skip"}[result["passed"]]
            print(f"{verdict}  {result['criterion']}\n      {result['figures']}", flush=True)
            results.append(result)
    if arguments.json is not None:
        environment = describe_environment(torch.get_num_threads(), arguments.device)
        text = json.dumps({"environment": environment, "results": results}, indent=1)
        arguments.json.write_text(text + "\n")
    return int(any(result["passed"] is False for result in results))


if __name__ == "__main__":
    # By its name, so that functions of it can run in processes of their own.
    import challenge_task_e

    sys.exit(challenge_task_e.main())
