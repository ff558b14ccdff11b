"""What a lazy head adds to a step of a tiny model, in microseconds.

    python benchmarks/lazy_overhead.py
    python benchmarks/lazy_overhead.py --profile        where the time of the lazy head goes

A step is what transformers' causal language models do: the head's call, upcast, view, cross
entropy, backward. Plain and patched heads take turns; the medians and the least times of all
rounds are printed, and those of memeff.linear_cross_entropy called by hand.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import memeff

TOKENS, FEATURES, VOCAB = (2, 24), 32, 101


def make_steps() -> dict[str, Callable[[], None]]:
    """Steps of a plain head, a patched one, and of the function by hand."""
    x = torch.randn(*TOKENS, FEATURES, requires_grad=True)
    target = torch.randint(VOCAB, TOKENS).view(-1)

    def of_head(lazy: bool) -> Callable[[], None]:
        head = nn.Linear(FEATURES, VOCAB, bias=False)
        if lazy:
            memeff.patch(head, strict=True)

        def step() -> None:
            logits = head(x).float()
            loss = F.cross_entropy(logits.view(-1, VOCAB), target.to(logits.device))
            loss.backward()

        return step

    weight = torch.randn(VOCAB, FEATURES, requires_grad=True)

    def by_hand() -> None:
        memeff.linear_cross_entropy(x.view(-1, FEATURES), weight, target).backward()

    return {"plain": of_head(False), "patched": of_head(True), "by hand": by_hand}


def main(arguments: list[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2000, help="default %(default)s")
    parser.add_argument("--profile", action="store_true", help="of the patched head's steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    steps = make_steps()
    if options.profile:
        profile = cProfile.Profile()
        steps["patched"]()
        profile.enable()
        for _ in range(options.rounds):
            steps["patched"]()
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
        return 0
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - begin) * 1e6)
    print(f"{'us per step':12}{'median':>10}{'least':>10}{'median over plain':>20}")
    plain = statistics.median(times["plain"])
    for name, of_one in times.items():
        median = statistics.median(of_one)
        print(f"{name:12}{median:10.1f}{min(of_one):10.1f}{median - plain:20.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
