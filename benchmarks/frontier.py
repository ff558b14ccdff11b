"""Time against memory, predicted: what memeff.plan makes of memory budgets on GPUs. Needs no GPU.

    python benchmarks/frontier.py                          the table, on stdout
    python benchmarks/frontier.py --plot docs/frontier.png

A forward and backward pass in bfloat16. Times are the planner's own predictions (FLOPs, tiles that
stay empty, launches, memory traffic: predicted_cost in csrc/cuda/plan_cost.cpp) at the rates of
predict_cuda.py. Nothing here is a measurement of memeff. The peers' points are their own figures.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

from predict_cuda import GPUS, Gpu

import memeff

MIB = 2**20
FEATURES, VOCAB = 4096, 128256
TOKENS = (4096, 8192, 16384)  # those that are drawn, at VOCAB classes
SHAPES = (*((tokens, VOCAB) for tokens in TOKENS), (16384, 131072))  # of the tables
CAPABILITIES = {"A100 80GB": (8, 0), "H100 SXM": (9, 0), "H200": (9, 0)}
DRAWN = [gpu for gpu in GPUS if gpu.name in CAPABILITIES]
BUDGETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
KERNELS = {"generic": "generic, the default", "own": "handwritten"}

# On an H200, at this shape: (what, tokens, ms, MiB over the gradients). Liger's pull request 1472,
# Triton kernels in chunks, 1066 MiB of gradients taken off. (QuACK 0.6.1, 17.33 ms at 4096 tokens,
# says nothing about its memory.)
PEERS = (
    ("1 chunk", 8192, 53.04, 1128.66 - 1066),
    ("8 chunks", 8192, 37.75, 1568.04 - 1066),
    ("16 chunks", 8192, 35.07, 2068.04 - 1066),
)


@dataclass(frozen=True)
class Point:
    """A plan under a budget in MiB, and its predicted milliseconds."""

    budget: int
    plan: memeff.Plan
    ms: float

    @property
    def mib(self) -> float:
        return self.plan.workspace_bytes / MIB


def floor_ms(gpu: Gpu, tokens: int, vocab: int = VOCAB) -> float:
    """Time of the three bare products."""
    return 6.0 * tokens * FEATURES * vocab / gpu.tflops / 1e9


def frontier(gpu: Gpu, tokens: int, kernels: str, vocab: int = VOCAB) -> list[Point]:
    """One point per budget; `kernels`: a key of KERNELS."""
    capability = CAPABILITIES[gpu.name]
    own = "sm90" if capability == (9, 0) else "sm80"
    family = own if kernels == "own" else "generic"
    os.environ["MEMEFF_CUDA_KERNELS"] = f"{family},{family}"
    points = []
    for budget in BUDGETS:
        plan = memeff.plan(
            tokens, FEATURES, vocab, "bfloat16", backend="cuda", memory_budget=budget * MIB,
            compute_capability=capability,
        )  # fmt: skip
        points.append(Point(budget, plan, plan.predicted_flops / gpu.tflops / 1e9))
    return points


def table(gpu: Gpu, tokens: int, vocab: int) -> list[str]:
    """Markdown, a row for every budget that changes a plan."""
    floor = floor_ms(gpu, tokens, vocab)
    columns = [frontier(gpu, tokens, kernels, vocab) for kernels in KERNELS]
    head = [f"{name}: MiB taken | N D V | ms | x floor" for name in KERNELS.values()]
    lines = [
        f"{gpu.name}, {tokens} tokens, {vocab} classes; three bare products: {floor:.1f} ms",
        "",
        f"| budget, MiB | {' | '.join(head)} |",
        "| --- |" + " --- |" * 4 * len(KERNELS),
    ]
    before: list[str] = []
    for points in zip(*columns, strict=True):
        cells = []
        for point in points:
            ndv = 6 * point.plan.flops / point.plan.floor_flops
            cells += [
                f"{point.mib:.0f}", f"{ndv:.2f}", f"{point.ms:.1f}", f"{point.ms / floor:.2f}"
            ]  # fmt: skip
        if cells != before:
            lines.append(f"| {points[0].budget} | {' | '.join(cells)} |")
        before = cells
    return lines


def draw(path: str) -> None:
    """A panel per GPU: time over that of the three bare products, against the workspace."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(DRAWN), figsize=(12, 4.6), sharey=True, layout="constrained"
    )
    for axis, gpu in zip(axes, DRAWN, strict=True):
        for i, tokens in enumerate(TOKENS):
            for kernels, style in zip(KERNELS, ("-", ":"), strict=True):
                points = frontier(gpu, tokens, kernels)
                memory = [point.mib for point in points]
                ratios = [point.ms / floor_ms(gpu, tokens) for point in points]
                label = f"{tokens} tokens, {KERNELS[kernels]}"
                axis.step(memory, ratios, style, where="post", color=f"C{i}", label=label)
            for chunks, at, ms, mib in PEERS:
                if gpu.name == "H200" and at == tokens:
                    ratio = ms / floor_ms(gpu, tokens)
                    label = "Liger, 8192 tokens, measured by Liger"
                    axis.plot(mib, ratio, "^", color=f"C{i}", mec="black", label=label)
                    box = {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none"}
                    axis.annotate(
                        chunks, (mib, ratio), (7, 5), textcoords="offset points", fontsize=8,
                        bbox=box,
                    )  # fmt: skip
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=gpu.name, xscale="log", xlabel="workspace, MiB")
        axis.set_xticks((32, 128, 512, 2048), ("32", "128", "512", "2048"))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="time, x floor (three bare products = 1)", ylim=(0.95, None))
    handles: dict[str, object] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8)
    what = f"forward + backward, bfloat16, {FEATURES} features, {VOCAB} classes"
    figure.suptitle(f"PREDICTED, not measured: {what}", fontsize=10)
    figure.savefig(path, dpi=80)


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", metavar="PATH", help="draw instead (needs matplotlib)")
    options = parser.parse_args(arguments)
    if options.plot:
        draw(options.plot)
        return
    for gpu in DRAWN:
        for shape in SHAPES:
            print("\n".join(table(gpu, *shape)) + "\n")


if __name__ == "__main__":
    main()
