"""A whole training step of a Llama-shaped model, plain and under memeff.patch: memory and time.

    python benchmarks/patched_step.py                     2048 tokens, the head of Llama 3.2 1B
    python benchmarks/patched_step.py --shape 4096,1024,128256 --layers 4 --json results.json

A step is forward, backward and SGD of a random LlamaForCausalLM of transformers in float32, untied.
"without head" leaves the head and its loss out: what is more than that, and than the gradients of
head and hidden states, is what computing the loss costs. Times are of interleaved rounds in one
process, peaks over the model of processes of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import memeff
from memeff.bench.environment import describe_environment, warn_if_busy
from memeff.bench.isolated import call_isolated
from memeff.bench.memory import PeakMemory
from memeff.bench.shapes import parse_shape
from memeff.bench.timing import time_interleaved

MIB = 2**20
ALLOWED = 64 * MIB  # over a step without head, and the gradients
WAYS = ("without head", "plain", "patched")


def make_model(features: int, vocab: int, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=features,
            intermediate_size=4 * features,
            num_hidden_layers=layers,
            num_attention_heads=max(1, features // 64),
            max_position_embeddings=8192,
            tie_word_embeddings=False,
        )
    )


def make_step(model: Any, tokens: int) -> Callable[[str], None]:
    """step(way), which patches or unpatches the model before."""
    ids = torch.randint(model.config.vocab_size, (1, tokens))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(way: str) -> None:
        if way == "patched":
            memeff.patch(model, strict=True)
        else:
            memeff.unpatch(model)
        if way == "without head":
            loss = model.model(ids).last_hidden_state.square().mean()
        else:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_bytes(way: str, tokens: int, features: int, vocab: int, layers: int) -> int:
    """Over the model, gradients included; call it in a process of its own."""
    make_step(make_model(features, 128, layers), 16)(way)
    step = make_step(make_model(features, vocab, layers), tokens)
    with PeakMemory() as peak:
        step(way)
    return peak.extra_bytes


def measure_peaks(tokens: int, features: int, vocab: int, layers: int) -> dict[str, int]:
    import patched_step  # by its own name: processes cannot import it as __main__

    sizes = {"tokens": tokens, "features": features, "vocab": vocab, "layers": layers}
    return {way: call_isolated(patched_step.peak_bytes, way=way, **sizes) for way in WAYS}


def most_bytes(peaks: dict[str, int], tokens: int, features: int, vocab: int) -> int:
    """What a step with the loss may take: one without, the gradients, and ALLOWED."""
    return peaks["without head"] + 4 * features * (tokens + vocab) + ALLOWED


def main(arguments: list[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="2048,2048,128256", help="N,D,V (default %(default)s)")
    parser.add_argument("--layers", type=int, default=1, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="default %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results to PATH")
    options = parser.parse_args(arguments)
    shape = parse_shape(options.shape)
    sizes = (shape.tokens, shape.features, shape.vocab)

    warn_if_busy()
    peaks = measure_peaks(*sizes, options.layers)
    most = most_bytes(peaks, *sizes)
    step = make_step(make_model(shape.features, shape.vocab, options.layers), shape.tokens)
    step("without head")
    calls = {way: (lambda way=way: step(way), lambda: None) for way in WAYS}
    timings = time_interleaved(calls, options.rounds, torch.device("cpu"))
    print(f"{shape} float32, {options.layers} layers\n{'':14}{'s':>9}{'peak MiB':>10}")
    for way in WAYS:
        print(f"{way:14}{timings[way].median:9.2f}{peaks[way] / MIB:10.1f}")
    print(f"allowed: {most / MIB:.1f} MiB (without head, gradients, {ALLOWED // MIB} MiB)")
    if options.json is not None:
        content = {
            **describe_environment(torch.get_num_threads(), "cpu"),
            "transformers": metadata.version("transformers"),
            "tokens": shape.tokens,
            "features": shape.features,
            "vocab": shape.vocab,
            "layers": options.layers,
            "rounds": options.rounds,
            "allowed_bytes": most,
            "results": [
                {
                    "way": way,
                    "median_s": timings[way].median,
                    "seconds": timings[way].seconds,
                    "peak_bytes": peaks[way],
                }
                for way in WAYS
            ],
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
