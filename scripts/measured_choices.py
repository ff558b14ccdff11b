"""From figures of memeff-bench to the table of measured choices, csrc/cuda/measured_choices.inc.

Candidates and the rule of choice are memeff/bench/choices.py's.
"""

from collections.abc import Sequence

from memeff.bench.choices import Choice

HEAD = """\
// The table of measured choices (select.h): which kernels were fastest on which GPU. Written by
// `make verify-gpu OUT=folder` as folder/measured_choices.inc, to be copied here.
//
// Rows: GPU, compute capability, dtype, tokens, features, classes, whether tiles are skipped, and
// the kernels "scores,products" as MEMEFF_CUDA_KERNELS names them. Above each its time and the
// others', ms of a forward and backward pass.
"""


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
