"""memeff-demo: trains the same small language model twice, with the standard loss and with memeff.

A decoder-only transformer learns Python's standard library. Both trainings start from the same seed
and see the same batches, each in a process of its own so that its peak memory can be measured.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import memeff
from memeff.bench.corpus import Vocabulary, standard_library_text
from memeff.bench.environment import warn_if_busy
from memeff.bench.isolated import call_isolated
from memeff.bench.memory import PeakMemory
from memeff.bench.progress import Progress

MIB = 2**20
LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Training:
    """Everything that both trainings share."""

    steps: int = 80
    vocab: int = 16384
    features: int = 128
    layers: int = 2
    heads: int = 4
    batch: int = 16
    context: int = 128
    text_bytes: int = 8_000_000
    held_out_batches: int = 4
    learning_rate: float = 3e-3
    seed: int = 0
    threads: int = 0

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.context


class Block(nn.Module):
    """Causal self-attention and a perceptron, each after a layer norm and added to its input."""

    def __init__(self, features: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(features)
        self.qkv = nn.Linear(features, 3 * features)
        self.out = nn.Linear(features, features)
        self.norm_mlp = nn.LayerNorm(features)
        self.mlp = nn.Sequential(
            nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        batch, context, features = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, context, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, context, features))
        return x + self.mlp(self.norm_mlp(x))


class LanguageModel(nn.Module):
    """Hidden states of a small transformer.

    The classifier is the embedding itself (tied weights); the loss applies it, not this module.
    """

    def __init__(self, training: Training):
        super().__init__()
        self.embedding = nn.Embedding(training.vocab, training.features)
        self.position = nn.Parameter(torch.zeros(training.context, training.features))
        self.blocks = nn.ModuleList(
            Block(training.features, training.heads) for _ in range(training.layers)
        )
        self.norm = nn.LayerNorm(training.features)
        nn.init.normal_(self.embedding.weight, std=training.features**-0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T] int64 -> [B, T, D]."""
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def standard_loss(
    hidden: torch.Tensor, classifier: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Logits [B T, V] in full, then cross entropy."""
    logits = hidden.flatten(0, 1) @ classifier.T
    return F.cross_entropy(logits.float(), targets.flatten())


def memeff_loss(
    hidden: torch.Tensor, classifier: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """The same without logits."""
    return memeff.linear_cross_entropy(hidden, classifier, targets)


LOSSES: dict[str, LossFunction] = {"standard": standard_loss, "memeff": memeff_loss}


def _batch(
    tokens: torch.Tensor, training: Training, starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows [B, T] and the same windows one token later."""
    windows = torch.stack(
        [tokens[start : start + training.context + 1] for start in starts.tolist()]
    )
    return windows[:, :-1], windows[:, 1:]


def train(loss: str, training: dict[str, Any]) -> dict[str, Any]:
    """One training; meant for a process of its own. Prints a line per step.

    Returns the loss of every step, the mean held-out loss, median seconds per step, and the peak
    bytes over the process as it was with the text and the model in memory (so: gradients, optimiser
    state, activations, loss).
    """
    config = Training(**training)
    if config.threads:
        torch.set_num_threads(config.threads)
    text = standard_library_text(config.text_bytes)
    vocabulary = Vocabulary(text, config.vocab)
    tokens = vocabulary.encode(text)
    # The last twentieth of the text is never trained on.
    cut = len(tokens) - len(tokens) // 20
    learnt, held_out = tokens[:cut], tokens[cut:]

    torch.manual_seed(config.seed)
    model = LanguageModel(config)
    loss_function = LOSSES[loss]
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    order = torch.Generator().manual_seed(config.seed)
    _load_libraries(config, loss_function)

    losses: list[float] = []
    seconds: list[float] = []
    with PeakMemory() as peak:
        for step in range(config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(1.0, (step + 1) / 10)
            starts = torch.randint(len(learnt) - config.context, (config.batch,), generator=order)
            inputs, targets = _batch(learnt, config, starts)
            begin = time.perf_counter()
            value = loss_function(model(inputs), model.embedding.weight, targets)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - begin)
            losses.append(value.item())
            print(f"step {step + 1} of {config.steps}, loss {losses[-1]:.3f}", flush=True)
        with torch.no_grad():
            spread = torch.linspace(
                0, len(held_out) - config.context - 1, config.batch * config.held_out_batches
            ).long()
            held_out_losses = []
            for starts in spread.split(config.batch):
                inputs, targets = _batch(held_out, config, starts)
                value = loss_function(model(inputs), model.embedding.weight, targets)
                held_out_losses.append(value.item())
    return {
        "losses": losses,
        "held_out": statistics.mean(held_out_losses),
        "step_seconds": statistics.median(seconds),
        "peak_bytes": peak.extra_bytes,
    }


def _load_libraries(config: Training, loss_function: LossFunction) -> None:
    """One step of a toy model, so that no figure contains the start of the libraries."""
    toy = LanguageModel(Training(vocab=512, features=config.features, heads=config.heads, layers=1))
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    loss_function(toy(tokens), toy.embedding.weight, tokens).backward()


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """`values` averaged into at most `width` columns and drawn with eight heights of block
    characters.
    """
    columns = min(width, len(values))
    edges = [i * len(values) // columns for i in range(columns + 1)]
    means = [statistics.mean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round((mean - low) / span * 7)] for mean in means)


def _plot(path: str, results: dict[str, dict[str, Any]], config: Training) -> bool:
    """Both curves, their difference and the peak memory as an image; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, (curves, difference, memory) = pyplot.subplots(
        1, 3, figsize=(13, 4), layout="constrained", width_ratios=(3, 3, 2)
    )
    steps = range(1, config.steps + 1)
    # The curves lie on one another: a broad pale one with a thin dashed one on it shows both.
    styles: dict[str, dict[str, Any]] = {
        "standard": {"color": "#8fa9c4", "linewidth": 5},
        "memeff": {"color": "#c1121f", "linewidth": 1.8, "linestyle": "--"},
    }
    for name, result in results.items():
        curves.plot(steps, result["losses"], label=name, **styles[name])
        bar = memory.bar(name, result["peak_bytes"] / MIB, color=styles[name]["color"])
        memory.bar_label(bar, fmt="{:.0f} MiB", padding=2)
    difference.plot(steps, [abs(a - b) for a, b in _pairs(results)], color="#555555")
    curves.set(title="training loss", xlabel="step", ylabel="nats per token")
    curves.legend()
    difference.set(title="|difference of the losses|", xlabel="step", ylabel="nats per token")
    difference.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    memory.set(title="peak memory", ylabel="MiB over text and model")
    memory.margins(y=0.12)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _pairs(results: dict[str, dict[str, Any]]) -> list[tuple[float, float]]:
    return list(zip(results["standard"]["losses"], results["memeff"]["losses"], strict=True))


def _report(results: dict[str, dict[str, Any]], config: Training) -> None:
    standard, ours = results["standard"], results["memeff"]
    pairs = _pairs(results)
    print(f"\n{'step':>8} {'standard':>10} {'memeff':>10} {'difference':>11}")
    shown = sorted({0, *range(9, config.steps, 10), config.steps - 1})
    for step in shown:
        a, b = pairs[step]
        print(f"{step + 1:>8} {a:>10.5f} {b:>10.5f} {abs(a - b):>11.1e}")
    print(f"{'held out':>8} {standard['held_out']:>10.5f} {ours['held_out']:>10.5f} "
          f"{abs(standard['held_out'] - ours['held_out']):>11.1e}")  # fmt: skip
    print(
        f"\nlargest difference over {config.steps} steps: {max(abs(a - b) for a, b in pairs):.1e}"
    )
    for name, result in results.items():
        losses = result["losses"]
        print(f"{name:>9} {sparkline(losses)} {losses[0]:.2f} -> {losses[-1]:.2f}")
    logits = config.tokens_per_step * config.vocab * 4 / MIB
    print(f"\npeak memory over text and model (one step's float32 logits are {logits:.0f} MiB):")
    for name, result in results.items():
        memory, step_ms = result["peak_bytes"] / MIB, result["step_seconds"] * 1e3
        print(f"{name:>9} {memory:8.1f} MiB   {step_ms:7.1f} ms per step")
    print(f"{'ratio':>9} {standard['peak_bytes'] / ours['peak_bytes']:8.1f} x     "
          f"{standard['step_seconds'] / ours['step_seconds']:7.2f} x")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    defaults = Training()
    parser = argparse.ArgumentParser(
        prog="memeff-demo", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--steps", type=int, default=defaults.steps, help="default %(default)s")
    parser.add_argument("--vocab", type=int, default=defaults.vocab, help="default %(default)s")
    parser.add_argument(
        "--batch", type=int, default=defaults.batch, help="windows per step (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="default %(default)s")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads (default: torch's own choice)"
    )
    parser.add_argument(
        "--plot", default="memeff-demo.png", metavar="PATH", help="default %(default)s"
    )
    options = parser.parse_args(arguments)
    for name in ("steps", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; expected at least 1")
    if options.vocab < 1024:
        parser.error(f"--vocab is {options.vocab}; expected at least 1024")
    config = Training(
        steps=options.steps,
        vocab=options.vocab,
        batch=options.batch,
        seed=options.seed,
        threads=options.threads,
    )
    print(
        f"Python's standard library, {config.text_bytes / 1e6:.0f} MB, vocabulary {config.vocab}; "
        f"transformer with {config.layers} layers, D={config.features}; "
        f"{config.tokens_per_step} tokens per step, {config.steps} steps",
        flush=True,
    )
    warn_if_busy()
    progress = Progress()
    results = {}
    for name in LOSSES:
        progress.update(f"{name}: reading the text")

        def show(line: str, name: str = name) -> None:
            progress.update(f"{name}: {line}")

        results[name] = call_isolated(train, on_line=show, loss=name, training=asdict(config))
    progress.clear()
    _report(results, config)
    drawn = _plot(options.plot, results, config)
    print(f"\nwrote {options.plot}" if drawn else "\nno picture: pip install matplotlib")
    return 0


if __name__ == "__main__":
    sys.exit(main())
