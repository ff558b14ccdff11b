"""Predicted time of memeff's CUDA kernels from their FLOPs and bytes; needs no GPU.

    python benchmarks/predict_cuda.py --shape 4096,4096,128256

One line per step of a forward and backward pass in 16 bits with scores kept in the gradient's
memory (N <= D). A step takes as long as its slower side, arithmetic or memory; steps follow one
another.
What a GPU sustains is an assumption (see GPUS), not a measurement of these kernels.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Sustained rates in plain 16-bit matrix products and in streaming memory."""

    name: str
    tflops: float
    gb_per_s: float


# Peaks are NVIDIA's data sheets': 65 / 312 / 989 / 989 dense 16-bit TFLOP/s and 320 / 2039 / 3350 /
# 4800 GB/s. Matrix products usually reach 60 to 80 % of the peak, memory 85 to 92 %.
GPUS = (
    Gpu("T4", 40, 270),
    Gpu("A100 80GB", 250, 1800),
    Gpu("H100 SXM", 700, 3000),
    Gpu("H200", 790, 4300),
)


def steps(n: int, d: int, v: int, products: str) -> list[tuple[str, float, float]]:
    """(step, FLOPs, bytes of global memory) of one pass; operands read once per pass."""
    product = 2.0 * n * d * v
    x, w, scores = 2.0 * n * d, 2.0 * v * d, 2.0 * n * v
    tiles = 8.0 * n * v / 128  # maxima and sums of tiles of 128 classes
    listed = [
        ("scores and statistics", product, x + w + scores + tiles),
        ("merge statistics", 0.0, tiles),
    ]
    if products != "from scores":
        listed.append(("scores -> gradients of the logits", 0.0, 2 * scores + tiles / 2))
    listed.append(("grad_input", product, scores + w + x))
    if products != "cublas":
        listed += [
            ("move them out of grad_weight", 0.0, 2 * scores),
            ("grad_weight", product, scores + x + w),
        ]
    else:  # cuBLAS writes fp32 sums, which are rounded in a pass of their own
        listed += [
            ("grad_weight", product, scores + x + 2 * w),
            ("round grad_input and grad_weight", 0.0, 3 * (w + x)),
        ]
    return listed


def seconds(gpu: Gpu, flops: float, moved: float) -> float:
    return max(flops / (gpu.tflops * 1e12), moved / (gpu.gb_per_s * 1e9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4096,4096,128256", help="N,D,V")
    n, d, v = map(int, parser.parse_args().shape.split(","))
    for products in ("handwritten", "from scores", "cublas"):
        print(f"\nN={n} D={d} V={v}, 16 bits, gradient products: {products}; ms")
        print(f"{'step':36}{'GFLOP':>9}{'GB':>8}" + "".join(f"{gpu.name:>12}" for gpu in GPUS))
        totals = [0.0] * len(GPUS)
        for name, flops, moved in steps(n, d, v, products):
            times = [seconds(gpu, flops, moved) * 1e3 for gpu in GPUS]
            totals = [a + b for a, b in zip(totals, times, strict=True)]
            print(
                f"{name:36}{flops / 1e9:9.0f}{moved / 1e9:8.2f}"
                + "".join(f"{time:12.2f}" for time in times)
            )
        floors = [3 * seconds(gpu, 2.0 * n * d * v, 0) * 1e3 for gpu in GPUS]
        print(f"{'sum':53}" + "".join(f"{total:12.2f}" for total in totals))
        print(
            f"{'x floor (three bare products)':53}"
            + "".join(f"{a / b:12.2f}" for a, b in zip(totals, floors, strict=True))
        )


if __name__ == "__main__":
    main()
