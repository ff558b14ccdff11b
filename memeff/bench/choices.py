"""Which kernels are the fastest: candidates by GPU, and the choice among them.

The variants "memeff=SCORES+PRODUCTS" (and "memeff~MASS=SCORES+PRODUCTS") of one run of memeff-bench
are the same calls on different kernels; memeff-tune times them in processes of their own. The rule
is one. csrc/cuda/select.h says how choices are used.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Kernels for scores and products to compare, by compute capability; the first is what selection
# takes without a measurement. Newer GPUs run what sm_80 does.
CANDIDATES = {
    80: ("generic+generic", "sm80+generic", "sm80+sm80"),
    90: (
        "generic+generic", "sm90+generic", "sm90x2+generic", "sm90x2+sm90x2", "sm90+sm90",
        "sm90x2+sm90rs", "sm90+sm90rs", "sm80+generic",
    ),
}  # fmt: skip
# With skip_mass; only handwritten products skip.
SKIPPING_CANDIDATES = {
    80: ("generic+generic", "sm80+sm80", "sm80+generic"),
    90: (
        "generic+generic", "sm90+sm90", "sm90x2+sm90", "sm90+sm90rs", "sm90+generic", "sm80+sm80",
    ),
}  # fmt: skip

# Another choice than the first must win by more than the noise of a median,
LEAST_GAIN = 0.005
# and be as exact: errors differ by the order of sums, a wrong kernel's by far more.
MOST_ERROR_RATIO = 1.5

_NAME = re.compile(r"memeff(?P<mass>~[\d.e-]+)?=(?P<scores>\w+)\+(?P<products>\w+)")


def candidates(capability: int, skips: bool = False) -> tuple[str, ...]:
    """The kernels to compare on a GPU, "scores+products"; none where there is no choice."""
    table = SKIPPING_CANDIDATES if skips else CANDIDATES
    if capability < min(table):
        return ()
    return table.get(capability, table[80])


@dataclass(frozen=True)
class Choice:
    """A row: the fastest kernels at a shape, and the seconds of all that were compared."""

    dtype: str
    tokens: int
    features: int
    vocab: int
    skips: bool
    kernels: str  # "scores+products"
    seconds: dict[str, float]


def choices_of(runs: Sequence[dict[str, Any]]) -> list[Choice]:
    """The choices that the runs of memeff-bench's JSON files lead to, in their order.

    Only forward and backward passes count, and only where at least two kernels were measured, one
    of them without large errors.
    """
    found = []
    for run in runs:
        if not run["backward"]:
            continue
        for skips in (False, True):
            compared: dict[str, dict[str, Any]] = {}
            for variant in run["variants"]:
                name = _NAME.fullmatch(variant["name"])
                if name is None or (name["mass"] is not None) != skips:
                    continue
                if "median_s" in variant:  # not one that could not run
                    compared[f"{name['scores']}+{name['products']}"] = variant
            if len(compared) > 1:
                sizes = (run["tokens"], run["features"], run["vocab"])
                seconds = {name: v["median_s"] for name, v in compared.items()}
                best = _best(compared)
                if best is not None:
                    found.append(Choice(run["dtype"], *sizes, skips, best, seconds))
    return found


def _best(compared: dict[str, dict[str, Any]]) -> str | None:
    """The fastest of those that are right; the first unless another is clearly faster."""
    least = {
        part: min(filter(math.isfinite, (v["errors"][part] for v in compared.values())), default=0)
        for part in ("loss", "dx", "dw")
    }
    # The loss has few digits to lose: its error may be 0.
    slack = {"loss": 1e-6, "dx": 0.0, "dw": 0.0}
    right = {
        name: variant["median_s"]
        for name, variant in compared.items()
        if all(
            variant["errors"][part] <= MOST_ERROR_RATIO * least[part] + slack[part]
            for part in least
        )
    }
    return fastest(right) if right else None


def fastest(seconds: Mapping[str, float]) -> str:
    """The name of the fastest; the first unless another is clearly faster."""
    first, best = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
    return first if seconds[first] * (1 - LEAST_GAIN) <= seconds[best] else best
