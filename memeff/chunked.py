"""``chunked_linear_apply``: any function of whole rows of logits, a chunk of tokens at a time.

Nothing about the function is known or assumed: its derivatives come from autograd.

Two modes:

gradients in forward
    For a function that returns a scalar per chunk, to be summed: each chunk's gradients are
    computed while its logits are there, for an upstream gradient of 1; backward multiplies them.
    Three matrix products' work.

recompute
    For anything. The forward pass keeps results only. They hang in an ordinary autograd graph whose
    saved tensors are dropped and computed again, chunk by chunk, by torch.utils.checkpoint, so that
    whatever the function closes over gets its gradient in the ordinary way. Four matrix products'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from memeff._checks import check_callable, check_flag
from memeff._gradient_sums import GradientSum, ReadyGradients
from memeff._gradients import (
    CapturedResult,
    Unchanged,
    add_gradient,
    captured_leaves,
    first_derivatives_only,
    is_batch,
    node_number,
    outside_of_graphs,
    refuse_tangents,
)
from memeff._heads import Chunk, Head, choose_chunk_size
from memeff._operands import HEAD, check_head, check_per_token
from memeff._options import parse_options

__all__ = ["chunked_linear_apply"]

Results = Tensor | tuple[Tensor, ...]


def chunked_linear_apply(
    fn: Callable[..., Results],
    input: Tensor,
    linear_weight: Tensor,
    *per_token_tensors: Tensor,
    linear_bias: Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | str | None = None,
    upcast: bool = True,
    recompute: bool | None = None,
) -> Results:
    """Apply ``fn`` to ``input @ linear_weight.T + linear_bias`` without storing all the logits.

    ``fn(logits, *chunks)`` gets the logits [c, V] of c tokens and the same c rows of each of
    ``per_token_tensors``. The number c varies. It returns a tensor or a tuple of tensors, each

    - per token, [c, ...]: the chunks are put together to [..., ...] in the order of the tokens, or
    - a scalar: the chunks are added up. A mean over all tokens is a sum, divided afterwards.

    Gradients flow to ``input``, ``linear_weight``, ``linear_bias``, ``per_token_tensors`` and to
    every tensor that ``fn`` closes over, such as parameters. Autocast and the state of the random
    number generators are the same when ``fn`` runs again (dropout).

    Args:
        fn: the function; it may be called more than once for the same tokens.
        input: hidden states [..., D]; bfloat16, float16, float32 or float64.
        linear_weight: [V, D], dtype of ``input``.
        per_token_tensors: each [..., *any shape] with the leading dimensions of ``input``.
        linear_bias: [V] or None.
        chunk_size: tokens per chunk; the last chunk may be smaller. Without it and a budget 32 to
            1024, by what the gradient of the weight takes in any case. Larger ones are faster.
        memory_budget: instead of ``chunk_size``, bytes for the logits of a chunk and three results
            of their size (the needs of ``fn`` are not known), as int or like "64MiB".
        upcast: logits are float32 for 16-bit inputs, straight from float32 sums. Without it they
            have the dtype of ``input``.
        recompute: False computes gradients in the forward pass, which asks for one differentiable
            result, a scalar; True computes each chunk again in the backward pass; None takes the
            former where it is possible, except for float16, where small gradients could underflow.
            To find that out ``fn`` runs on the first chunk, which recomputing then has to repeat.

    Returns:
        What ``fn`` returns, for all tokens.

    Raises:
        TypeError, ValueError, RuntimeError: an argument, or a result of ``fn``, of the wrong type
            or shape. Backward raises RuntimeError where it would compute logits again from an
            argument that was modified in place.
    """
    check_callable("fn", fn)
    return apply_to_chunks(
        lambda chunk, *tensors: fn(chunk.logits(), *tensors),
        input,
        linear_weight,
        {f"per_token_tensors[{i}]": tensor for i, tensor in enumerate(per_token_tensors)},
        linear_bias=linear_bias,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        upcast=upcast,
        recompute=recompute,
    )


def apply_to_chunks(
    fn: Callable[..., Results],
    input: Tensor,
    linear_weight: Tensor,
    per_token: Mapping[str, Tensor],
    *,
    linear_bias: Tensor | None,
    chunk_size: int | None,
    memory_budget: int | str | None = None,
    upcast: bool = True,
    recompute: bool | None,
    names: tuple[str, str, str] = HEAD,
) -> Results:
    """As `chunked_linear_apply`, for a function of a chunk: its ``logits()``, and with
    ``recompute=False`` all that `Chunk` has.

    ``per_token``: the tensors by the names that error messages give them; ``names``: those of the
    hidden states, the weight and the bias.
    """
    rows, linear_weight, linear_bias = check_head(input, linear_weight, linear_bias, names)
    check_per_token(per_token, input, names[0])
    tensors_by_name = dict(zip(names, (input, linear_weight, linear_bias), strict=True))
    refuse_tangents({**tensors_by_name, **per_token})
    check_flag("upcast", upcast)
    if recompute is not None:
        check_flag("recompute", recompute)
    lead = input.shape[:-1]
    rows = rows.reshape(lead.numel(), input.shape[-1])
    itemsize = max(4, rows.element_size()) if upcast else rows.element_size()
    if chunk_size is not None and memory_budget is not None:
        raise ValueError(
            f"chunk_size is {chunk_size} and memory_budget is {memory_budget!r}, expected only one"
        )
    options = parse_options(chunk_size=chunk_size, memory_budget=memory_budget)
    size = choose_chunk_size(
        len(rows), linear_weight, itemsize, options.chunk_size, options.memory_budget
    )
    tensors = [t.reshape(len(rows), *t.shape[len(lead) :]) for t in per_token.values()]
    call = _Call(fn, rows, linear_weight, linear_bias, tensors, size, upcast)
    # Compiled code breaks its graph here: what runs twice cannot be one graph of it.
    results: list[Tensor] = outside_of_graphs(call.run)(recompute)
    shaped = [r if r.dim() == 0 else r.reshape(lead + r.shape[1:]) for r in results]
    return tuple(shaped) if call.returns_tuple else shaped[0]


class _NotPossible(Exception):
    """Gradients cannot be computed in the forward pass."""


class _Call:
    """One call: rows [N, D], and per-token tensors [N, ...]."""

    def __init__(
        self,
        fn: Callable[..., Results],
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tensors: list[Tensor],
        chunk_size: int,
        upcast: bool,
    ) -> None:
        self.fn = fn
        self.rows, self.weight, self.bias, self.tensors = rows, weight, bias, tensors
        tokens = len(rows)
        self.bounds = [
            (begin, min(begin + chunk_size, tokens)) for begin in range(0, tokens, chunk_size)
        ] or [(0, 0)]  # no tokens: one empty chunk shows the shapes of the results
        self.head = Head(
            weight,
            bias,
            upcast=upcast,
            weight_grad=weight.dtype if weight.requires_grad else None,
            bias_grad=bias.dtype if bias is not None and bias.requires_grad else None,
        )
        self.returns_tuple = False

    def run(self, recompute: bool | None) -> list[Tensor]:
        if not torch.is_grad_enabled():
            rows = self.rows.detach()
            return self._join(
                self.apply(Chunk(self.head, rows[slice(*b)], False), self._rows_of(b), b[1] - b[0])
                for b in self.bounds
            )
        if recompute or (recompute is None and self.rows.dtype == torch.float16):
            return self._recompute_later()
        state = _RandomState(self.rows.device)
        try:
            return self._gradients_now()
        except _NotPossible as reason:
            if recompute is False:
                raise RuntimeError(f"recompute is False, expected None or True: {reason}") from None
        state.restore()
        return self._recompute_later()

    def apply(
        self, chunk: Chunk | _RecomputedChunk, tensors: Sequence[Tensor], tokens: int
    ) -> tuple[Tensor, ...]:
        """fn on one chunk, its results checked."""
        results = self.fn(chunk, *tensors)
        self.returns_tuple = isinstance(results, (tuple, list))
        listed = tuple(results) if isinstance(results, (tuple, list)) else (results,)
        for result in listed:
            if not isinstance(result, Tensor):
                raise TypeError(
                    f"fn returned {type(result).__name__}, expected a tensor or a tuple of tensors"
                )
            if result.dim() > 0 and len(result) != tokens:
                raise RuntimeError(
                    f"fn returned shape {tuple(result.shape)} for a chunk of {tokens} tokens, "
                    f"expected a scalar or [{tokens}, ...]"
                )
        return listed

    def _rows_of(self, bounds: tuple[int, int]) -> list[Tensor]:
        return [tensor[slice(*bounds)] for tensor in self.tensors]

    @staticmethod
    def _join(chunks: Iterator[tuple[Tensor, ...]]) -> list[Tensor]:
        """Results of all tokens: per-token ones put together, scalars summed."""
        return [
            torch.stack(parts).sum(0) if parts[0].dim() == 0 else torch.cat(parts)
            for parts in zip(*chunks, strict=True)
        ]

    # Gradients in forward.

    def _gradients_now(self) -> list[Tensor]:
        sums = _Gradients(self.rows, self.tensors)
        chunks: list[tuple[Tensor, ...]] = []
        positions: set[int] = set()
        for bounds in self.bounds:
            results, position = self._differentiate_chunk(bounds, sums)
            chunks.append(results)
            if position is not None:
                positions.add(position)
        joined = self._join(iter(chunks))
        for position in positions:  # one at most
            pairs = [
                (self.rows, sums.rows),
                *zip((self.weight, self.bias), self.head.take_gradients(), strict=True),
                *zip(self.tensors, sums.tensors, strict=True),
                *sums.captured.items(),
            ]
            wanted = [(t, g) for t, g in pairs if t is not None and g is not None]
            joined[position] = ReadyGradients.apply(
                joined[position], [g for _, g in wanted], *(t for t, _ in wanted)
            )
        return joined

    def _differentiate_chunk(
        self, bounds: tuple[int, int], sums: _Gradients
    ) -> tuple[tuple[Tensor, ...], int | None]:
        """Results of one chunk and the position of the differentiable one; its gradients to sums.

        A function of its own, so that nothing of the chunk outlives it. It holds no logits either:
        they live as long as fn or the graph needs them.
        """
        begin, end = bounds
        chunk = Chunk(self.head, self.rows[begin:end], self.rows.requires_grad)
        leaves = [
            part.detach().requires_grad_(part.requires_grad) for part in self._rows_of(bounds)
        ]
        number = node_number(self.rows.device)
        results = self.apply(chunk, leaves, end - begin)
        position = self._differentiable(results)
        refuse_tangents({f"result {i} of fn": result for i, result in enumerate(results)})
        detached = tuple(result.detach() for result in results)
        if position is None:
            return detached, None
        result = results[position]
        del results
        own = [leaf for leaf in (*chunk.leaves, *leaves) if leaf.requires_grad]
        try:
            captured = captured_leaves(result, own, number)
        except CapturedResult as node:
            raise _NotPossible(
                f"fn closes over a result ({node}) of other differentiable computations"
            ) from None
        inputs = [*own, *captured]
        gradients = dict(
            zip(inputs, torch.autograd.grad(result, inputs, allow_unused=True), strict=True)
        )
        sums.add(bounds, [gradients.get(leaf) for leaf in leaves])
        for leaf in captured:
            add_gradient(sums.captured, leaf, gradients[leaf])
        direct = gradients.get(chunk.rows)  # where fn uses the rows without projecting them
        chunk.write_gradient(sums.rows, begin, direct)
        return detached, position

    @staticmethod
    def _differentiable(results: Sequence[Tensor]) -> int | None:
        """Position of the one result that needs gradients, a scalar; None if there is none."""
        positions = [i for i, result in enumerate(results) if result.requires_grad]
        if len(positions) > 1:
            raise _NotPossible(f"fn returns {len(positions)} differentiable results")
        if positions and results[positions[0]].dim() > 0:
            shape = tuple(results[positions[0]].shape)
            raise _NotPossible(
                f"the differentiable result of fn is not a scalar, it has shape {shape}"
            )
        return positions[0] if positions else None

    # Recompute.

    def _recompute_later(self) -> list[Tensor]:
        shared = _Shared(self.head, self.rows.detach(), self.rows.requires_grad, self.tensors)
        token = _Operands.apply(shared, self.rows, self.weight, self.bias)
        sizes = [end - begin for begin, end in self.bounds]
        # One split per tensor: its backward puts the chunks' gradients together once.
        parts = [tensor.split(sizes) for tensor in self.tensors]

        def one_chunk(bounds: tuple[int, int], *chunks: Tensor) -> tuple[Tensor, ...]:
            shared.check_unchanged()
            return self.apply(
                _RecomputedChunk(token, shared, bounds), chunks, bounds[1] - bounds[0]
            )

        joined = self._join(
            checkpoint(one_chunk, bounds, *(part[i] for part in parts), use_reentrant=False)
            for i, bounds in enumerate(self.bounds)
        )
        shared.forward_ends()
        return joined


def _sum_of_rows(rows: Tensor) -> GradientSum:
    return GradientSum(rows.shape, rows.dtype, rows.device)


class _Gradients:
    """Gradients of everything but the head, as the chunks deliver them."""

    def __init__(self, rows: Tensor, tensors: Sequence[Tensor]) -> None:
        self.rows = _sum_of_rows(rows) if rows.requires_grad else None
        self.tensors = [torch.zeros_like(t) if t.requires_grad else None for t in tensors]
        self.captured: dict[Tensor, Tensor] = {}

    def add(self, bounds: tuple[int, int], gradients: Sequence[Tensor | None]) -> None:
        for whole, gradient in zip(self.tensors, gradients, strict=True):
            if whole is not None and gradient is not None:
                whole[slice(*bounds)] = gradient


class _Shared:
    """What the chunks of one recompute share: operands, and the gradients they add up."""

    def __init__(
        self, head: Head, rows: Tensor, rows_grad: bool, per_token: Sequence[Tensor]
    ) -> None:
        self.head, self.rows, self.rows_grad = head, rows, rows_grad
        self._per_token = per_token
        self._unchanged: Unchanged | None = None  # until the forward pass ends
        self._grad_rows: GradientSum | None = None
        self._backward = -1  # the backward pass that the sums belong to

    def forward_ends(self) -> None:
        """From now on nobody may change what backward computes again from."""
        tensors = {"input": self.rows, "linear_weight": self.head.weight}
        tensors |= {f"per_token_tensors[{i}]": tensor for i, tensor in enumerate(self._per_token)}
        if self.head.bias is not None:
            tensors["linear_bias"] = self.head.bias
        self._unchanged = Unchanged(tensors)

    def check_unchanged(self) -> None:
        """Raise an error where something was changed; for the start of a chunk's computation."""
        if self._unchanged is not None:
            self._unchanged.check()

    def add_gradients(self, grad_logits: Tensor, begin: int, end: int) -> None:
        if is_batch(grad_logits):
            raise NotImplementedError(
                "is_grads_batched (a batch of upstream gradients) is not implemented where logits "
                "are computed again, expected one upstream gradient at a time, or a scalar result "
                "and recompute=False"
            )
        self._begin_backward()
        hidden = self.rows[begin:end]
        gradient = self.head.add_gradients(grad_logits, hidden, self.rows_grad)
        if gradient is not None:
            if self._grad_rows is None:
                self._grad_rows = _sum_of_rows(self.rows)
            self._grad_rows.write(slice(begin, end), gradient)

    def take_gradients(self) -> list[Tensor | None]:
        self._begin_backward()
        grad_rows, self._grad_rows = self._grad_rows, None
        self._backward = -1
        if self.rows_grad and grad_rows is None:
            grad_rows = _sum_of_rows(self.rows)
        sums = grad_rows, *self.head.take_gradients()
        return [None if gradient is None else gradient.times(None, last=True) for gradient in sums]

    def _begin_backward(self) -> None:
        current = torch._C._current_graph_task_id()
        if self._backward != current:  # drops what a backward pass that failed has left behind
            self._grad_rows = None
            self.head.drop_gradients()
            self._backward = current


class _RecomputedChunk:
    """Tokens begin..end, whose logits hang on what `_Operands` returns."""

    def __init__(self, token: Tensor, shared: _Shared, bounds: tuple[int, int]) -> None:
        self._arguments = token, shared, *bounds

    def logits(self) -> Tensor:
        logits: Tensor = _ChunkLogits.apply(*self._arguments)
        return logits


class _Operands(torch.autograd.Function):
    """x, W, b -> a token on which all chunks' logits hang.

    Autograd runs its backward after those of all chunks, and so gets the sums of all chunks from
    it, rather than one [V, D] from each.
    """

    @staticmethod
    def forward(
        ctx: Any, shared: _Shared, rows: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.shared = shared
        return rows.new_zeros(())

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.shared.take_gradients()


class _ChunkLogits(torch.autograd.Function):
    """Logits of tokens begin..end."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, shared: _Shared, begin: int, end: int) -> Tensor:
        ctx.shared, ctx.bounds = shared, (begin, end)
        return shared.head.logits(shared.rows[begin:end])

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        ctx.shared.add_gradients(grad_logits, *ctx.bounds)
        return grad_logits.new_zeros((), dtype=ctx.shared.rows.dtype), None, None, None


class _RandomState:
    """The random number generators as they are now."""

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._devices: Any = None
        if device.type not in ("cpu", "meta"):
            self._devices = get_device_states(torch.empty(0, device=device))

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._devices is not None:
            set_device_states(*self._devices)
