"""A vocabulary that ranks share: time of a step on the CPU over gloo, and a model of larger groups.

    python benchmarks/distributed.py                            1 and 2 ranks, one thread each
    python benchmarks/distributed.py --shape 2048,512,32768 --ranks 1 2 4 --json results.json
    python benchmarks/distributed.py --ranks 1 2 --larger 4 8   and larger groups, extrapolated
    python benchmarks/distributed.py --model                    the table of docs/distributed.md

A step is the loss with both gradients. Every rank times it with its rows of the classifier, in
turns as one of the ranks ("shared") and by itself ("alone"), with the same products and nobody to
wait for. Their difference is what the ranks exchange and wait. Figures are medians over rounds, of
the slowest rank. Ranks that share a processor core measure the core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import memeff
from memeff.bench.environment import describe_environment, warn_if_busy
from memeff.bench.shapes import Shape, parse_shape

MIB = 2**20
Row = dict[str, float]


def measure(rank: int, ranks: int, folder: str, shape: Shape, dtype: str, rounds: int) -> None:
    """One rank: writes the medians of its two steps, in seconds."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks
    )
    shared = memeff.VocabParallel()
    of_dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    x = torch.randn(shape.tokens, shape.features).to(of_dtype).requires_grad_()
    y = torch.randint(shape.vocab, (shape.tokens,))
    rows = shape.vocab * (rank + 1) // ranks - shape.vocab * rank // ranks
    w = (torch.randn(rows, shape.features) / shape.features**0.5).to(of_dtype).requires_grad_()

    def step(together: bool) -> float:
        x.grad = w.grad = None
        dist.barrier()
        begin = time.perf_counter()
        target, parallel = (y, shared) if together else (y % rows, None)
        memeff.linear_cross_entropy(x, w, target, vocab_parallel=parallel).backward()
        return time.perf_counter() - begin

    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(rounds + 1):
        for together in (True, False):
            took = step(together)
            if turn > 0:  # the first one warms up
                seconds[together].append(took)
    found = {"shared": statistics.median(seconds[True]), "alone": statistics.median(seconds[False])}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run(ranks: int, shape: Shape, dtype: str, rounds: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
            measure, (ranks, folder, shape, dtype, rounds), nprocs=ranks
        )
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    plan = memeff.plan(shape.tokens, shape.features, shape.vocab, dtype, vocab_parallel=ranks)
    return {
        "ranks": ranks,
        "shared_s": max(each["shared"] for each in found),
        "alone_s": max(each["alone"] for each in found),
        "gathered_bytes": plan.gathered_bytes,
        "reduced_bytes": plan.reduced_bytes,
    }


def extrapolate(row: Row, ranks: int) -> Row:
    """A larger group, from what one of at least two ranks has measured: a rank computes its share
    of the classes, and the bytes of a ring go by (R - 1) / R. Latencies stay as they were."""
    measured = row["ranks"]
    alone = row["alone_s"] * measured / ranks
    share = (ranks - 1) / ranks * measured / (measured - 1)
    exchange = max(0.0, row["shared_s"] - row["alone_s"]) * share
    return row | {"ranks": ranks, "alone_s": alone, "shared_s": alone + exchange}


# ---- the model ----

# Liger's published figures: TFLOP/s per GPU, by TP, for this shape.
LIGER = Shape(2048, 4096, 131072)
FLOP_PER_SECOND = 768e12
PUBLISHED = {1: 768, 8: 638, 16: 386}
# Bytes per second of a GPU in each direction, and seconds per step of a ring. The rates are peaks
# of NVIDIA's data sheets: half of the H100's 900 GB/s, and InfiniBand NDR (400 Gb/s) with an
# adapter per GPU as in a DGX H100. The latencies are assumptions.
LINKS = {"NVLink": (450e9, 3e-6), "between nodes": (50e9, 10e-6)}


def predict(shape: Shape, ranks: int, link: str, sum_bytes: int, overlaps: bool) -> float:
    """Seconds of a step: three products, a ring's all-reduce of the sums of the input's gradient,
    and an all-gather of 24 bytes per token. ``overlaps``: the all-reduce of everything runs while
    the weight's gradient is computed."""
    bandwidth, latency = LINKS[link]
    product = 2 * shape.tokens * shape.features * shape.vocab / ranks / FLOP_PER_SECOND
    share = (ranks - 1) / ranks
    reduce = 2 * share * sum_bytes * shape.tokens * shape.features / bandwidth
    reduce += 2 * (ranks - 1) * latency
    gather = share * ranks * 24 * shape.tokens / bandwidth + (ranks - 1) * latency
    return 3 * product + gather + (max(0, reduce - product) if overlaps else reduce)


def model_table() -> str:
    """TFLOP/s per GPU, of the 6 N D V / R that are needed."""
    needed = 6 * LIGER.tokens * LIGER.features * LIGER.vocab
    lines = [
        "| ranks | link | fp32 sums | bf16 sums | fp32 sums, all overlapped | Liger |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for ranks, link in (
        (1, "NVLink"), (2, "NVLink"), (8, "NVLink"), (72, "NVLink"), (16, "between nodes"),
    ):  # fmt: skip
        cells = [
            f"{needed / ranks / predict(LIGER, ranks, link, size, overlaps) / 1e12:.0f}"
            for size, overlaps in ((4, False), (2, False), (4, True))
        ]
        published = PUBLISHED.get(ranks, "-")
        lines.append(f"| {ranks} | {link} | {' | '.join(cells)} | {published} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=parse_shape, default=Shape(2048, 512, 32768))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--larger", type=int, nargs="+", default=[], help="extrapolate the largest group to these"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write results and environment to this file")
    parser.add_argument("--model", action="store_true", help="print the model's table, and end")
    options = parser.parse_args(arguments)
    if options.model:
        print(model_table())
        return
    if options.larger and max(options.ranks) < 2:
        parser.error(f"--larger extrapolates a group, expected one in --ranks {options.ranks}")
    warn_if_busy()
    print("ranks  shared ms  alone ms  exchange ms  MiB gathered  MiB reduced, per rank")
    rows = []
    for ranks in options.ranks:
        rows.append(run(ranks, options.shape, options.dtype, options.rounds))
        show(rows[-1])
    largest = max(rows, key=lambda row: row["ranks"])
    larger = [extrapolate(largest, ranks) for ranks in options.larger]
    for row in larger:
        show(row, "extrapolated")
    if options.json is not None:
        result: dict[str, Any] = {
            "environment": describe_environment(1, "cpu"), "shape": str(options.shape),
            "dtype": options.dtype, "rounds": options.rounds, "rows": rows,
            "extrapolated": larger,
        }  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def show(row: Row, note: str = "") -> None:
    shared, alone = 1e3 * row["shared_s"], 1e3 * row["alone_s"]
    sent = row["gathered_bytes"] / MIB, row["reduced_bytes"] / MIB
    print(
        f"{row['ranks']:5.0f}  {shared:9.1f}  {alone:8.1f}  {shared - alone:11.1f}  "
        f"{sent[0]:12.2f}  {sent[1]:11.2f}  {note}".rstrip(),
        flush=True,
    )


if __name__ == "__main__":
    main()
