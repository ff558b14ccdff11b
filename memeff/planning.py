"""``memeff.plan``: what a call would do and how much memory it would take, without running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memeff import _library
from memeff._checks import DTYPES, check_choice, check_flag, check_int
from memeff._options import check_accum_dtype, parse_options

__all__ = ["Plan", "plan"]

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
# What decides about the plan.
_OPTIONS = (
    "reduction", "label_smoothing", "softcap", "return_statistics", "memory_budget", "chunk_size",
    "accum_dtype", "skip_mass",
)  # fmt: skip
_OLDEST_CAPABILITY = (7, 5)  # the generic kernels' first
_KINDS = {
    "statistics": "statistics only, no gradients",
    "token_chunks": "token chunks, gradients in forward",
    "vocab_slices": "vocabulary slices, scores computed again",
}


@dataclass(frozen=True, repr=False)
class Plan:
    """How a call is computed. ``str(plan)`` is a readable summary."""

    tokens: int
    features: int
    vocab: int
    """Where ranks share it, the largest shard; all that follows is for the rank of that."""
    dtype: torch.dtype
    backend: str
    ranks: int
    """How many ranks share the vocabulary; 0: it is not shared."""
    kind: str
    """"statistics", "token_chunks" or "vocab_slices"."""
    kernels: str
    """What computes: "avx512_bf16", "bf16_portable", "blas" (torch's products) or "batch_invariant"
    (torch's products, but for the scores) on the CPU; on a GPU the families of kernels for scores
    and for products of gradients: "sm90,generic" (generic: cuBLAS)."""
    kernels_reason: str
    """Why these: "default", which says on GPUs where memeff-tune may enable faster ones; "tuned on
    NVIDIA H200 at 8192x4096x128256", the nearest shape that memeff-tune has timed on this machine;
    "measured on ...", that of memeff's own table of measured choices; "predicted", where products
    of the same family are expected to win in the memory that is allowed; or "MEMEFF_CUDA_KERNELS"
    or "MEMEFF_CPU_KERNELS", the environment variables."""
    tokens_per_chunk: int
    num_chunks: int
    vocab_per_slice: int
    num_slices: int
    stored_in_gradient: int
    """Tokens whose scores are kept in the memory of the weight gradient until it is written."""
    stored_in_workspace: int
    """Vocabulary slices: tokens whose scores are kept in the workspace."""
    accumulation: str
    """How the weight gradient adds up: "exact" (one product), "float32", "compact" (a 16-bit
    gradient's own bits with exponents in common: 32 times finer than bfloat16)."""
    input_accumulation: str
    """How the input's gradient adds up where slices of the vocabulary contribute to it: "float32",
    or "compact", in its own memory, on GPUs."""
    workspace_bytes: int
    """Allocated beyond the gradients; ``memory_budget`` bounds it together with library_bytes."""
    library_bytes: int
    """What torch's matrix products may take for packed or upcast operands, where these compute the
    scores."""
    floor_bytes: int
    """The gradients themselves."""
    flops: float
    """The matrix products of this plan, forward and backward."""
    floor_flops: float
    """The matrix products that no implementation can do without."""
    predicted_flops: float
    """FLOPs of products that would run for as long as the plan is predicted to take. What exceeds
    ``flops`` is for memory traffic, the softmax, and on GPUs for launches and tiles that stay
    empty. 0 where nothing is predicted: on the CPU for vocabulary slices and the bf16 kernels."""
    all_gathers: int
    """Shared vocabulary: how many, one per block of tokens, forward and backward. One more per
    operator, of about 3 KiB, compares what the ranks compute; class weights take one more each."""
    gathered_bytes: int
    """What this rank gives to those of blocks; with class weights it is 8 bytes more per token and
    operator."""
    all_reduces: int
    """Shared vocabulary: how many, of the sums of the input's gradient of a block of tokens."""
    reduced_bytes: int
    """What this rank gives to them; half of it with reduce_dtype=torch.bfloat16."""

    @property
    def steps(self) -> str:
        """What happens, in a sentence."""
        kept = min(self.stored_in_gradient, self.tokens)
        rest = self.tokens - kept
        chunk = min(self.tokens_per_chunk, rest)
        chunks = _count(-(-rest // chunk), "chunk") if chunk else "0 chunks"
        in_gradient = f"{kept} tokens kept in the gradient's memory"
        if self.kind != "vocab_slices":
            if not rest:
                return in_gradient
            of_tokens = f"{chunks} of up to {chunk} tokens"
            return f"{in_gradient}, then {chunks} of up to {chunk}" if kept else of_tokens
        in_workspace = min(self.stored_in_workspace, rest)
        again = rest - in_workspace
        parts = [in_gradient] if kept else []
        parts += [f"{in_workspace} in the workspace"] if in_workspace else []
        parts += [f"scores of {again} computed again"] if again else []
        slices = f"{_count(self.num_slices, 'slice')} of up to {self.vocab_per_slice} classes"
        return f"{', '.join(parts)}; {slices}"

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shared = f" on each of {self.ranks} ranks" if self.ranks else ""
        return (
            f"<memeff.Plan of {self.tokens} x {self.features} x {self.vocab} {dtype}{shared} on "
            f"{self.backend}: {self.steps}; {_mebibytes(self.workspace_bytes)} of workspace>"
        )

    def __str__(self) -> str:
        lines = {
            "problem": f"{self.tokens} tokens x {self.features} features x {self.vocab} classes, "
            f"{str(self.dtype).removeprefix('torch.')}",
            "plan": _KINDS.get(self.kind, self.kind),
            "kernels": f"{self.backend}: {self.kernels}",
            "steps": self.steps,
            "accumulation": self.accumulation,
            "of the input": self.input_accumulation,
            "workspace": _mebibytes(self.workspace_bytes),
            "library": f"{_mebibytes(self.library_bytes)} at most, inside torch's products",
            "gradients": _mebibytes(self.floor_bytes),
            "logits": f"{_mebibytes(4 * self.tokens * self.vocab)} in float32, not stored",
            "products": f"{self.flops:.3g} FLOP, of which needed {self.floor_flops:.3g}",
            "ranks": f"{self.ranks}; each gives {_mebibytes(self.gathered_bytes)} to "
            f"{_count(self.all_gathers, 'all-gather')} and {_mebibytes(self.reduced_bytes)} to "
            f"{_count(self.all_reduces, 'all-reduce')}",
        }
        if self.backend == "cuda":
            lines["kernels"] += f" ({self.kernels_reason})"
        if self.input_accumulation != "compact":
            del lines["of the input"]
        if not self.library_bytes:
            del lines["library"]
        if not self.ranks:
            del lines["ranks"]
        return "\n".join(f"{name:<12} {value}" for name, value in lines.items())


def plan(
    tokens: int | Tensor,
    features: int | Tensor,
    vocab: int | Tensor | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    reduction: str = "mean",
    input_grad: bool | None = None,
    weight_grad: bool | None = None,
    bias_grad: bool = False,
    probabilities: bool = False,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    return_statistics: bool = False,
    memory_budget: int | str | None = None,
    chunk_size: int | None = None,
    accum_dtype: torch.dtype | None = None,
    skip_mass: float = 0.0,
    vocab_parallel: int | None = None,
    backend: str = "auto",
    compute_capability: tuple[int, int] | None = None,
) -> Plan:
    """Plan a call of `memeff.linear_cross_entropy` without running it.

    The problem is given in numbers, ``plan(tokens, features, vocab, dtype)``, or as the tensors of
    the call, ``plan(input, linear_weight[, target])``, which may be meta tensors.

    Args:
        tokens: number of tokens N, or the input [..., D].
        features: number of features D, or the linear_weight [V, D].
        vocab: number of classes V, or the target (only its kind matters), or nothing.
        dtype: a torch dtype or its name, "bfloat16"; of the tensors when these are given.
        input_grad, weight_grad, bias_grad: which gradients will be wanted. None: what the tensors
            require; for numbers, yes.
        probabilities: whether the targets are class probabilities.
        reduction, label_smoothing, softcap, return_statistics, memory_budget, chunk_size,
            accum_dtype, skip_mass: as in the call.
        vocab_parallel: number of ranks that share the vocabulary (`memeff.VocabParallel`); the plan
            is that of each rank. ``vocab`` then counts the classes of all of them, which are
            divided evenly, and ``linear_weight`` has the rows of the largest shard.
        backend: as in the call; "cuda" needs no GPU, nor a build with CUDA.
        compute_capability: (major, minor) of the GPU to plan for; ``backend="auto"`` then means
            "cuda". None: of the current GPU, else (9, 0).

    Raises:
        TypeError: a missing argument, or one of the wrong type.
        ValueError: a bad value, or a memory_budget in which no plan fits; the message states the
            minimum.
    """
    ranks, of_tensors = 0, isinstance(tokens, Tensor)
    if vocab_parallel is not None:
        ranks = check_int("vocab_parallel", vocab_parallel, "a number of ranks >= 1, or None", 1)
    if isinstance(tokens, Tensor):
        input, linear_weight = tokens, features
        if not isinstance(linear_weight, Tensor) or linear_weight.dim() != 2 or input.dim() < 1:
            raise TypeError(
                "plan takes (tokens, features, vocab, dtype) or an input [..., D] and a "
                f"linear_weight [V, D], got a tensor of shape {tuple(input.shape)} and {features!r}"
            )
        if isinstance(vocab, Tensor):
            probabilities = probabilities or vocab.is_floating_point()
        elif vocab is not None:
            raise TypeError(f"the target must be a tensor or None, got {vocab!r}")
        device, dtype = input.device, dtype or input.dtype
        tokens, features = input.shape[:-1].numel(), input.shape[-1]
        vocab = linear_weight.shape[0]
        input_grad = input.requires_grad if input_grad is None else input_grad
        weight_grad = linear_weight.requires_grad if weight_grad is None else weight_grad
    else:
        device = torch.device("cpu")
    sizes: dict[str, Any] = {"tokens": tokens, "features": features, "vocab": vocab}
    for name, size in sizes.items():
        check_int(name, size, "a number >= 0", least=0)
    if ranks and not of_tensors:
        sizes["vocab"] = -(-sizes["vocab"] // ranks)
    largest = sizes["tokens"] + sizes["features"], sizes["features"] + sizes["vocab"]
    if 8 * largest[0] * largest[1] >= 2**63:
        raise ValueError(
            f"{tokens} tokens, {features} features and {vocab} classes, expected matrices whose "
            "bytes can be counted in 64 bits"
        )
    if dtype is None:
        raise TypeError(
            f"plan is missing the dtype, expected one as in plan({tokens}, {features}, {vocab}, "
            "torch.bfloat16)"
        )
    wanted = {"input_grad": input_grad, "weight_grad": weight_grad, "bias_grad": bias_grad}
    for name, flag in wanted.items():
        if flag is not None or name == "bias_grad":
            check_flag(name, flag)
    check_flag("probabilities", probabilities)
    dtype_name = str(dtype).removeprefix("torch.")
    check_choice("dtype", dtype_name, tuple(_DTYPES))
    parsed = parse_options(
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=softcap,
        return_statistics=return_statistics,
        memory_budget=memory_budget,
        chunk_size=chunk_size,
        accum_dtype=accum_dtype,
        skip_mass=skip_mass,
        backend=backend,
    )
    check_accum_dtype(accum_dtype, _DTYPES[dtype_name])
    _check_capability(compute_capability, backend)
    if backend == "auto":
        on_gpu = compute_capability is not None or device.type == "cuda"
        backend = "cuda" if on_gpu else "cpu"
    if backend == "reference":
        raise ValueError('backend is "reference", expected one with a plan: it stores the logits')

    options = {name: flag is not False for name, flag in wanted.items()}
    options |= {name: getattr(parsed, name) for name in _OPTIONS}
    chosen: dict[str, Any] = _library.load().plan(
        **sizes,
        dtype=dtype_name,
        backend=backend,
        probabilities=probabilities,
        ranks=ranks,
        **_gpu(compute_capability, device),
        options=options,
    )
    dtype = _DTYPES[dtype_name]
    summed = ranks > 0 and options["input_grad"]
    width = 8 if dtype == torch.float64 else 4
    chosen["reduced_bytes"] = sizes["tokens"] * sizes["features"] * width if summed else 0
    return Plan(**sizes, dtype=dtype, backend=backend, ranks=ranks, **chosen)


def _check_capability(capability: Any, backend: str) -> None:
    if capability is None:
        return
    pair = isinstance(capability, tuple) and len(capability) == 2
    if not pair or not all(type(number) is int for number in capability):
        raise TypeError(
            f"compute_capability must be a tuple of two ints such as (9, 0), got {capability!r}"
        )
    if not _OLDEST_CAPABILITY <= capability < (100, 0) or not 0 <= capability[1] <= 9:
        raise ValueError(
            f"compute_capability is {capability}, expected (7, 5) or newer, such as (9, 0)"
        )
    if backend == "cpu":
        raise ValueError(
            f"compute_capability is {capability} with backend='cpu', expected a GPU: "
            "backend='cuda' or 'auto'"
        )


def _gpu(given: tuple[int, int] | None, device: torch.device) -> dict[str, int | str]:
    """The GPU to plan for: its compute capability, 10 * major + minor; its name and number of
    multiprocessors where they are known."""
    name, multiprocessors = "", 0
    if given is None and torch.cuda.is_available():
        index = device if device.type == "cuda" else None
        properties = torch.cuda.get_device_properties(index)
        given, name = (properties.major, properties.minor), properties.name
        multiprocessors = properties.multi_processor_count
    major, minor = given or (9, 0)
    return {"capability": 10 * major + minor, "gpu": name, "multiprocessors": multiprocessors}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
