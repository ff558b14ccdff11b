"""From figures of memeff-bench to the table of measured choices, csrc/cuda/measured_choices.inc.

The variants "memeff=SCORES+PRODUCTS" (and "memeff~MASS=SCORES+PRODUCTS") of one run are the same
calls on different kernels; the fastest becomes a row. csrc/cuda/select.h says how rows are used.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Kernels for scores and products to compare, by compute capability; the first is what selection
# takes without a measurement. Newer GPUs run what sm_80 does.
CANDIDATES = {
    80: ("sm80+generic", "sm80+sm80", "generic+generic"),
    90: (
        "sm90+generic", "sm90x2+generic", "sm90x2+sm90x2", "sm90+sm90", "sm90x2+sm90rs",
        "sm90+sm90rs", "sm80+generic", "generic+generic",
    ),
}  # fmt: skip
# With skip_mass; only handwritten products skip.
SKIPPING_CANDIDATES = {
    80: ("sm80+sm80", "sm80+generic"),
    90: ("sm90+sm90", "sm90x2+sm90", "sm90+sm90rs", "sm90+generic", "sm80+sm80"),
}  # fmt: skip

# Another choice than the first must win by more than the noise of a median,
LEAST_GAIN = 0.005
# and be as exact: errors differ by the order of sums, a wrong kernel's by far more.
MOST_ERROR_RATIO = 1.5

_NAME = re.compile(r"memeff(?P<mass>~[\d.e-]+)?=(?P<scores>\w+)\+(?P<products>\w+)")

HEAD = """\
// The table of measured choices (select.h): which kernels were fastest on which GPU. Written by
// `make verify-gpu OUT=folder` as folder/measured_choices.inc, to be copied here.
//
// Rows: GPU, compute capability, dtype, tokens, features, classes, whether tiles are skipped, and
// the kernels "scores,products" as MEMEFF_CUDA_KERNELS names them. Above each its time and the
// others', ms of a forward and backward pass.
"""


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
    if not right:
        return None
    fastest = min(right, key=right.__getitem__)
    first = next(iter(right))
    return first if right[first] * (1 - LEAST_GAIN) <= right[fastest] else fastest


def render(
    choices: Sequence[Choice], gpu: str, capability: int, remarks: Sequence[str], old: str = ""
) -> str:
    """The file: these choices of one GPU, and what `old`, the file so far, has of other GPUs.

    remarks: lines of comment above the rows: driver, commit, command.
    """
    _, *blocks = old.split("\n\n")
    kept = [block.strip() for block in blocks if "{" in block and f'{{"{gpu}"' not in block]
    rows = [f"// {gpu}", *(f"// {remark}" for remark in remarks)]
    for choice in choices:
        others = sorted(choice.seconds.items(), key=lambda item: item[1])
        times = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in others)
        fields = (
            f'"{gpu}"', capability, f"DType::k{_DTYPES[choice.dtype]}", choice.tokens,
            choice.features, choice.vocab, str(choice.skips).lower(),
            '"' + choice.kernels.replace("+", ",") + '"',
        )  # fmt: skip
        rows.append(f"// {times}")
        rows.append(f"{{{', '.join(map(str, fields))}}},")
    return "\n\n".join([HEAD.strip(), *kept, "\n".join(rows)]) + "\n"


_DTYPES = {"bfloat16": "BFloat16", "float16": "Float16"}
