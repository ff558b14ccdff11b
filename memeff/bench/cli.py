"""memeff-bench: time, memory and error of linear cross entropy, memeff and its peers."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from memeff._options import parse_options
from memeff.bench import report, training_step
from memeff.bench.environment import describe_environment, has_fast_bfloat16, warn_if_busy
from memeff.bench.measure import Settings, ShapeResult, measure_shape
from memeff.bench.problem import DTYPES
from memeff.bench.progress import Progress
from memeff.bench.shapes import MODELS, Shape, largest_affordable, parse_shape, sweep
from memeff.bench.timing import matmul_rate
from memeff.bench.training_step import ARCHITECTURES, StepSettings
from memeff.bench.variants import DEFAULT_VARIANTS, DESCRIPTIONS, check_names

# A default run makes about 80 passes of the length of the GEMM floor (all variants, warm-up,
# rounds, memory), next to about 50 s for compiling and for starting processes; 0.7 s a pass keeps
# the whole within two minutes.
_DEFAULT_FLOOR_SECONDS = 0.7
_DEFAULT_TOKENS = 2048


def _list_of_variants() -> str:
    lines = [f"  {name:<24}{description}" for name, description in DESCRIPTIONS.items()]
    return "\n".join(["variants:", *lines])


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="memeff-bench",
        description="Compares ways to compute linear cross entropy: time against the bare matrix\n"
        "products, measured peak memory, error against float64. Without options: one shape\n"
        "sized to this machine, within two minutes.",
        epilog=_list_of_variants(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="N,D,V",
        help="tokens, features, vocabulary (repeatable)",
    )
    parser.add_argument(
        "--model", action="append", default=[], choices=sorted(MODELS), metavar="NAME",
        help="head of a known model (repeatable): " + ", ".join(sorted(MODELS)),
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=_DEFAULT_TOKENS, help="N for --model (default %(default)s)"
    )
    parser.add_argument(
        "--step",
        action="store_true",
        help="a whole training step of each --model, plain and under memeff.patch: "
        + ", ".join(ARCHITECTURES),
    )
    parser.add_argument(
        "--layers", type=int, default=2, help="with --step: layers kept (default %(default)s)"
    )
    parser.add_argument(
        "--context", type=int, default=512, help="with --step: tokens per sequence (default 512)"
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help='with --step: largest batch that fits into it, "8GiB"'
    )
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        help="default: bfloat16 where the processor multiplies it, else float32",
    )
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--forward", action="store_true", help="loss only, without gradients")
    direction.add_argument(
        "--backward", action="store_true", help="loss and both gradients (default)"
    )
    parser.add_argument(
        "--softcap", type=float, help="soft-cap of the logits (--model gemma-2-* brings its own)"
    )
    parser.add_argument(
        "--variants",
        metavar="NAME,...",
        help="comma-separated, from the list below (default: all that the device can have)",
    )
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default: 5, on GPUs 20)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument(
        "--device", default="cpu", help="torch device, such as cuda (default %(default)s)"
    )
    parser.add_argument(
        "--peaked", action="store_true", help="raise the target's logit, as a trained model does"
    )
    parser.add_argument("--json", metavar="PATH", help="write every figure to PATH")
    parser.add_argument(
        "--plot", metavar="PATH", help="draw time and memory into PATH (needs matplotlib)"
    )
    parser.add_argument(
        "--against", choices=("N", "V"), default="V",
        help="with --plot and a single shape: measure 1/8, 1/4, 1/2, 1 of this (default V)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        parser.error(f"--device is {options.device!r}: {str(error).splitlines()[0]}")
    if device.type not in DEFAULT_VARIANTS:
        parser.error(f"--device is {options.device!r}; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(
            f"--device is {options.device!r}, but torch finds {torch.cuda.device_count()} CUDA "
            "devices (python -m memeff.diagnostics reports why)"
        )
    if options.variants is None:
        options.variants = list(DEFAULT_VARIANTS[device.type])
    else:
        options.variants = options.variants.split(",")
    if options.rounds is None:
        options.rounds = 20 if device.type == "cuda" else 5
    try:
        options.shape = [parse_shape(text) for text in options.shape]
        check_names(options.variants)
    except ValueError as error:
        parser.error(str(error))
    if options.step:
        _check_step(parser, options)
    for name in ("tokens", "rounds", "threads", "layers", "context"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; expected at least 1")
    if options.softcap is not None and options.softcap <= 0:
        parser.error(f"--softcap is {options.softcap}; expected a positive number")
    if options.plot:
        try:
            import matplotlib  # noqa: F401  before a long run, not after it
        except ImportError:
            parser.error("--plot needs matplotlib: pip install matplotlib")
    return options


def _check_step(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    options.model = options.model or ["llama-3.2-1b"]
    unknown = [name for name in options.model if name not in ARCHITECTURES]
    if options.shape or options.forward or options.plot or unknown:
        given = f"--model {unknown[0]}" if unknown else "--shape, --forward or --plot"
        parser.error(f"--step is for one of {', '.join(ARCHITECTURES)}, and was given {given}")
    if options.tokens % options.context:
        parser.error(f"--tokens is {options.tokens}; expected a multiple of {options.context}")
    if options.memory is not None:
        try:
            options.memory = parse_options(memory_budget=options.memory).memory_budget
        except ValueError:
            parser.error(f"--memory is {options.memory!r}; expected a size such as 8GiB")


def _problems(options: argparse.Namespace, dtype: str) -> list[tuple[Shape, float | None]]:
    """Shapes with their soft-caps, in the order they were asked for, --shape before --model."""
    problems = [(shape, options.softcap) for shape in options.shape]
    for name in options.model:
        head = MODELS[name]
        cap = head.softcap if options.softcap is None else options.softcap
        problems.append((Shape(options.tokens, head.features, head.vocab), cap))
    if not problems:
        rate = matmul_rate(DTYPES[dtype], torch.device(options.device))
        products = 1 if options.forward else 3
        problems = [(largest_affordable(rate, _DEFAULT_FLOOR_SECONDS, products), options.softcap)]
    if options.plot and len(problems) == 1:
        shape, cap = problems[0]
        problems = [(size, cap) for size in sweep(shape, options.against)]
    return problems


def _multiplies_bfloat16(device: str) -> bool:
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return has_fast_bfloat16()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device.startswith("cuda"):
        torch.cuda.set_device(options.device)
    threads = torch.get_num_threads()
    dtype = options.dtype or ("bfloat16" if _multiplies_bfloat16(options.device) else "float32")
    environment = describe_environment(threads, options.device)
    machine = environment["machine"]
    print(f"{machine.get('gpu', machine['cpu'])}, {threads} threads, torch {environment['torch']}, "
          f"memeff {environment['memeff']}", flush=True)  # fmt: skip
    warn_if_busy()

    progress = Progress()
    if options.step:
        steps = []
        for name in options.model:
            what = StepSettings(
                sizes=replace(ARCHITECTURES[name], layers=options.layers),
                tokens=options.tokens,
                context=options.context,
                dtype=dtype,
                rounds=options.rounds,
                threads=threads,
                device=options.device,
                memory=options.memory,
            )
            steps.append({"model": name, **training_step.measure_step(what, progress.update)})
            progress.clear()
            print("\n" + training_step.table(name, steps[-1], what), flush=True)
            _write_json(options.json, {**environment, "runs": steps})
        return 0
    finished: list[tuple[Settings, ShapeResult]] = []
    for shape, softcap in _problems(options, dtype):
        settings = Settings(
            dtype=dtype,
            backward=not options.forward,
            rounds=options.rounds,
            threads=threads,
            variants=options.variants,
            device=options.device,
            softcap=softcap,
            peaked=options.peaked,
        )
        result = measure_shape(shape, settings, progress.update)
        progress.clear()
        print("\n" + report.table(result, settings), flush=True)
        finished.append((settings, result))
        _write_json(options.json, report.to_json(environment, finished))
    print("\n" + report.LEGEND)

    if options.plot:
        report.plot(options.plot, finished[0][0], [result for _, result in finished])
        print(f"wrote {options.plot}")
    return 0


def _write_json(path: str | None, figures: dict[str, Any]) -> None:
    """After every shape: whatever ends this program leaves what was measured."""
    if path:
        Path(path).write_text(json.dumps(figures, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
