"""memeff-bench --step: one whole training step of a model, its head plain and under memeff.patch.

The model has the shape of a known one but random weights and fewer layers; its head is whole. A
step is forward, backward and AdamW. Peak memory is measured in a process of its own; times are of
one model whose head is patched and unpatched in turns.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memeff
from memeff.bench.isolated import IsolatedError, call_isolated
from memeff.bench.memory import PeakMemory
from memeff.bench.problem import DTYPES
from memeff.bench.timing import time_interleaved

MIB = 2**20


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder like Llama's; `tied`: the head's weight is the embedding's."""

    features: int
    vocab: int
    layers: int
    heads: int
    key_heads: int
    perceptron: int
    tied: bool


# Sizes are those of each model's published config.json.
ARCHITECTURES = {
    "llama-2-7b": Architecture(4096, 32000, 32, 32, 32, 11008, False),
    "llama-3.2-1b": Architecture(2048, 128256, 16, 32, 8, 8192, True),
    "llama-3.2-3b": Architecture(3072, 128256, 28, 24, 8, 8192, True),
    "llama-3.1-8b": Architecture(4096, 128256, 32, 32, 8, 14336, False),
    "mistral-7b": Architecture(4096, 32000, 32, 32, 8, 14336, False),
}

# What a step does with its last hidden states.
VARIANTS = {
    "plain": "logits in float32, then cross entropy",
    "memeff.patch": "the same code on a patched model",
    "no head": "a sum of hidden states in place of head and loss",
}


class Layer(nn.Module):
    """Causal attention and a gated perceptron, each after a norm and added to its input."""

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.heads, self.key_heads = sizes.heads, sizes.key_heads
        width = sizes.features // sizes.heads
        self.norm_attention = nn.RMSNorm(sizes.features)
        self.queries = nn.Linear(sizes.features, sizes.heads * width, bias=False)
        self.keys_values = nn.Linear(sizes.features, 2 * sizes.key_heads * width, bias=False)
        self.out = nn.Linear(sizes.heads * width, sizes.features, bias=False)
        self.norm_perceptron = nn.RMSNorm(sizes.features)
        self.gate_up = nn.Linear(sizes.features, 2 * sizes.perceptron, bias=False)
        self.down = nn.Linear(sizes.perceptron, sizes.features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        normed = self.norm_attention(x)
        q = self.queries(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.keys_values(normed).unflatten(-1, (2, self.key_heads, -1)).unbind(2)
        attended = F.scaled_dot_product_attention(
            _rotated(q), _rotated(k.transpose(1, 2)), v.transpose(1, 2), is_causal=True,
            enable_gqa=True,
        )  # fmt: skip
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm_perceptron(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def _rotated(x: Tensor) -> Tensor:
    """Rotary positions: [B, heads, T, width], each pair of halves turned by its position."""
    half = x.shape[-1] // 2
    rates = 500000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Decoder(nn.Module):
    """Token ids [B, T] -> next-token loss; or, without a head, a sum of hidden states."""

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocab, sizes.features)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.features)
        self.head = nn.Linear(sizes.features, sizes.vocab, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if sizes.tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, with_head: bool = True) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        if not with_head:
            return x.float().square().mean()
        logits = self.head(x[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@dataclass(frozen=True)
class StepSettings:
    """One run. A batch is `tokens` // `context` sequences of `context` tokens."""

    sizes: Architecture
    tokens: int
    context: int
    dtype: str
    rounds: int
    threads: int
    device: str = "cpu"
    memory: int | None = None

    @property
    def sequences(self) -> int:
        return self.tokens // self.context


def _settings(fields: dict[str, Any]) -> StepSettings:
    """Undoes dataclasses.asdict."""
    return StepSettings(**{**fields, "sizes": Architecture(**fields["sizes"])})


def _training(sizes: Architecture, dtype: str, device: str) -> tuple[Decoder, torch.optim.AdamW]:
    torch.manual_seed(0)
    with torch.device(device):
        model = Decoder(sizes).to(DTYPES[dtype])
    # Fused: the others make copies of the largest weight.
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def _step(
    model: Decoder, optimizer: torch.optim.Optimizer, ids: Tensor, variant: str
) -> Callable[[], None]:
    def step() -> None:
        model(ids, with_head=variant != "no head").backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _choose(model: Decoder, variant: str) -> None:
    if variant == "memeff.patch":
        memeff.patch(model, strict=True)
    else:
        memeff.unpatch(model)


def _batch(settings: StepSettings, sequences: int) -> Tensor:
    size = (sequences, settings.context)
    return torch.randint(settings.sizes.vocab, size, device=settings.device)


def measure_peak(variant: str, sequences: int, settings: dict[str, Any]) -> dict[str, int]:
    """Bytes of a step, in a process of its own: `weights`; `peak` over these; `state`: what of
    the peak are gradients and AdamW's averages. The averages are there before the step, as in
    every step of a training run but the first."""
    chosen = _settings(settings)
    torch.set_num_threads(chosen.threads)
    toy = Architecture(64, 512, 1, 2, 1, 128, True)
    model, optimizer = _training(toy, chosen.dtype, chosen.device)
    _choose(model, variant)
    _step(model, optimizer, torch.randint(512, (2, 16), device=chosen.device), variant)()
    model, optimizer = _training(chosen.sizes, chosen.dtype, chosen.device)
    _choose(model, variant)
    ids = _batch(chosen, sequences)
    step = _step(model, optimizer, ids, variant)
    gc.collect()
    with PeakMemory(chosen.device) as peak:
        _make_averages(model, optimizer)
        step()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    without_gradient = variant == "no head" and not chosen.sizes.tied
    state = 3 * weights - (model.head.weight.nbytes if without_gradient else 0)
    return {"weights": weights, "peak": peak.extra_bytes, "state": state}


def _make_averages(model: Decoder, optimizer: torch.optim.Optimizer) -> None:
    """By one step of gradients that are zero, of one parameter after the other."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        parameter.grad = None


def measure_times(settings: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of each variant's steps, in turns, in a process of its own."""
    chosen = _settings(settings)
    torch.set_num_threads(chosen.threads)
    model, optimizer = _training(chosen.sizes, chosen.dtype, chosen.device)
    ids = _batch(chosen, chosen.sequences)
    calls = {}
    for variant in VARIANTS:
        reset = _chooser(model, variant)
        reset()
        step = _step(model, optimizer, ids, variant)
        step()  # warm up
        calls[variant] = (step, reset)
    timings = time_interleaved(calls, chosen.rounds, torch.device(chosen.device), print)
    return {variant: timing.seconds for variant, timing in timings.items()}


def _chooser(model: Decoder, variant: str) -> Callable[[], None]:
    return lambda: _choose(model, variant)


def measure_step(settings: StepSettings, progress: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one model, in bytes and seconds."""

    def peak_of(variant: str, sequences: int) -> dict[str, int]:
        progress(f"peak memory, {variant}, {sequences} sequences")
        found: dict[str, int] = call_isolated(
            measure_peak, variant=variant, sequences=sequences, settings=asdict(settings)
        )
        return found

    results: dict[str, Any] = {name: peak_of(name, settings.sequences) for name in VARIANTS}
    times = call_isolated(measure_times, on_line=progress, settings=asdict(settings))
    for variant, seconds in times.items():
        results[variant]["seconds"] = seconds
    if settings.memory is not None:
        for variant in ("plain", "memeff.patch"):

            def total(sequences: int, variant: str = variant) -> int:
                found = peak_of(variant, sequences)
                return found["weights"] + found["peak"]

            known = {settings.sequences: results[variant]["weights"] + results[variant]["peak"]}
            found, size = largest_batch(settings.memory, known, total)
            results[variant] |= {"largest_batch": found, "largest_batch_bytes": size}
    return {"step": asdict(settings), "variants": results}


def largest_batch(
    memory: int, known: dict[int, int], bytes_of: Callable[[int], int]
) -> tuple[int, int]:
    """The largest batch whose step takes at most `memory` bytes, and its bytes; (0, 0) if none.

    `known`: bytes of a first batch. Each next one is where a line through the smallest and the
    largest that are known meets `memory`; the answer was measured, as was the next larger batch,
    unless ten measurements did not find it.
    """
    known = dict(known)
    for _ in range(10):
        fits = max((batch for batch, size in known.items() if size <= memory), default=0)
        fails = min((batch for batch, size in known.items() if size > memory), default=None)
        if fails is not None and fails - fits <= 1:
            break
        low, high = min(known), max(known)
        if low == high:
            proposed = 2 * low if fits else low // 2
        else:
            slope = max(1.0, (known[high] - known[low]) / (high - low))
            proposed = low + int((memory - known[low]) / slope)
        proposed = max(proposed, fits + 1)
        if fails is not None:
            proposed = min(proposed, fails - 1)
        try:
            known[proposed] = bytes_of(proposed)
        except IsolatedError:  # killed: more than the machine has
            known[proposed] = max(memory + 1, *known.values())
    return fits, known.get(fits, 0)


def table(name: str, result: dict[str, Any], settings: StepSettings) -> str:
    """The figures of the model `name` as aligned text."""
    variants = result["variants"]
    parameters = variants["plain"]["weights"] // DTYPES[settings.dtype].itemsize
    lines = [
        f"{name} with {settings.sizes.layers} of {ARCHITECTURES[name].layers} layers "
        f"({parameters / 1e6:.0f} M parameters, {settings.dtype}), "
        f"{settings.sequences} x {settings.context} tokens, AdamW",
        f"{'':14}{'s / step':>10}{'x plain':>9}{'peak MiB':>10}{'over state':>12}"
        + (f"{'largest batch':>15}" if settings.memory else ""),
    ]
    plain = median(variants["plain"]["seconds"])
    for name, figures in variants.items():
        seconds = median(figures["seconds"])
        line = (
            f"{name:14}{seconds:10.2f}{seconds / plain:9.2f}{figures['peak'] / MIB:10.0f}"
            f"{(figures['peak'] - figures['state']) / MIB:12.0f}"
        )
        if "largest_batch" in figures:
            line += f"{figures['largest_batch']:15d}"
        lines.append(line)
    lines.append(
        "peak: of a step, over the weights. over state: without gradients and AdamW's averages."
    )
    if settings.memory:
        lines.append(
            f"largest batch: sequences of {settings.context} tokens whose step, with the weights, "
            f"takes at most {settings.memory / 2**30:.1f} GiB."
        )
    return "\n".join(lines)
