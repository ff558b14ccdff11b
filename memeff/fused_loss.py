"""``linear_loss``: a per-token loss of token statistics, reduced, with gradients in one pass.

The work of linear_cross_entropy, three matrix products, for a loss that the caller writes. As soon
as the statistics of a chunk of tokens are known, autograd differentiates the caller's function with
respect to them; the chunk's scores, still there, then become gradients of the logits.

The operator calls back for each chunk through another operator, differentiate_chunk, which this
file implements; a number says which call it belongs to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memeff import _arguments, _checks, statistics_ops
from memeff._gradient_sums import ReadyGradients
from memeff._gradients import CapturedResult, add_gradient, captured_leaves, node_number
from memeff.statistics import LogitStatistics
from memeff.token_statistics import check_shapes, compute_statistics

__all__ = ["linear_loss"]


def linear_loss(
    fn: Callable[..., Tensor],
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    *per_token_tensors: Tensor,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    logit_sum: bool = False,
    memory_budget: int | str | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The loss ``fn(statistics, *chunks)`` of every token, reduced, without storing the logits.

    ``fn`` gets the :class:`memeff.LogitStatistics` of c tokens (``logprob`` [c] or [c, K],
    ``lse`` [c], ``max_logit`` [c], and if asked for ``entropy`` [c], ``logit_sum`` [c] and
    ``mean_logit`` [c]) and the same c rows of each of
    ``per_token_tensors``; it returns their losses, [c]. A token's loss must depend on that token
    alone; what goes beyond (sequence-level ratios, say) takes :func:`linear_token_statistics`.
    Gradients flow to ``input``, ``linear_weight``, ``linear_bias``, ``per_token_tensors``, and
    parameters that ``fn`` closes over. They are computed in the forward pass, with three exceptions
    that recompute the scores: float16, whose gradients could underflow before a loss scale is
    applied; ``reduction="none"``; and on GPUs several targets per token.

    Args:
        input, linear_weight, target, linear_bias, ignore_index, softcap, logit_scale, entropy,
            logit_sum, memory_budget, chunk_size, backend: as in :func:`linear_token_statistics`.
        fn: as above; it is called once per chunk of tokens.
        reduction: "mean": the sum divided by the number of tokens with a target other than
            ``ignore_index`` (by that of all tokens without targets), at least by 1; "sum"; or
            "none": the loss of every token. Tokens whose target (each of whose targets) is
            ``ignore_index`` are not looked at: ``fn`` gets zeros for their statistics, and their
            losses count as 0.
        num_items: with "mean", the denominator in place of that number: an int or a 0-d tensor. For
            gradient accumulation over several calls.

    Returns:
        The loss, 0-d or in the leading dimensions of ``input``, float32 (float64 for float64
        inputs). Second derivatives raise an error.
    """
    _checks.check_choice("reduction", reduction, _checks.REDUCTIONS)
    options: dict[str, Any] = {
        "linear_bias": linear_bias, "ignore_index": ignore_index, "softcap": softcap,
        "logit_scale": logit_scale, "entropy": entropy, "logit_sum": logit_sum,
        "memory_budget": memory_budget, "chunk_size": chunk_size, "backend": backend,
    }  # fmt: skip
    for name, tensor in (("input", input), ("linear_weight", linear_weight)):
        _checks.check_tensor(name, tensor)
    for position, tensor in enumerate(per_token_tensors):
        _checks.check_tensor(f"per_token_tensors[{position}]", tensor)
    check_shapes(input, linear_weight, target, linear_bias)
    denominator = _arguments.parse_num_items(num_items, reduction, input.device)
    lead = input.shape[:-1]
    for position, tensor in enumerate(per_token_tensors):
        if tensor.shape[: len(lead)] != lead:
            raise RuntimeError(
                f"per_token_tensors[{position}] has shape {tuple(tensor.shape)}, expected one that "
                f"begins with {tuple(lead)}, the leading dimensions of input"
            )
    rows = [t.reshape(lead.numel(), *t.shape[len(lead) :]) for t in per_token_tensors]
    if target is not None:
        target = target.reshape(lead.numel(), *target.shape[len(lead) :])
    x = input.flatten(0, -2) if lead else input.unsqueeze(0)

    operands = [t for t in (x, linear_weight, linear_bias) if t is not None]
    resolved = _arguments.resolve_backend(backend, input.device, needs_reference=False)
    now = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    now = (
        now
        and reduction != "none"
        and all(t.numel() > 0 for t in operands)
        and _can_stop(resolved, x, target)
    )
    if not now:
        skip = target is not None
        statistics = compute_statistics(
            x, linear_weight, target, argmax=False, top_k=0, shift=0, skip_ignored=skip, **options
        )
        losses = _checked(fn(statistics, *rows), len(x))
        if target is not None:
            losses = losses.masked_fill(_ignored(target, ignore_index), 0)
        if reduction == "none":
            return losses.reshape(lead)
        total = losses.sum()
    else:
        wanted = entropy, logit_sum
        call = _Call(statistics_ops.LIBRARIES[resolved], fn, rows, target, ignore_index, *wanted)
        total = torch.compiler.disable(call.run)(x, linear_weight, linear_bias, options)
    if reduction == "sum":
        return total
    if denominator is not None:
        return total / denominator
    return total / _counted_tokens(target, lead.numel(), ignore_index)


def _counted_tokens(target: Tensor | None, tokens: int, ignore_index: int) -> Tensor | int:
    """Tokens with a target other than ``ignore_index``; all of them without targets."""
    if target is None:
        return tokens
    return (~_ignored(target, ignore_index)).sum().clamp(min=1)


def _ignored(target: Tensor, ignore_index: int) -> Tensor:
    """Which tokens have no target, [N]."""
    none = target == ignore_index
    return none if none.dim() == 1 else none.all(-1)


def _can_stop(backend: str, input: Tensor, target: Tensor | None) -> bool:
    """Whether the backend can ask for the loss of a chunk while it has the chunk's scores."""
    computed_in = _arguments.autocast_dtype(input.device)
    if torch.float16 in (input.dtype, computed_in):
        return False  # gradients could underflow before a loss scale is applied
    if backend == "reference":
        return False
    return backend == "cpu" or target is None or target.dim() == 1 or target.shape[1] == 1


def _checked(losses: Tensor, tokens: int) -> Tensor:
    if not isinstance(losses, Tensor) or losses.shape != (tokens,):
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses)
        raise RuntimeError(f"fn returned {got} for {tokens} tokens, expected shape ({tokens},)")
    return losses


class _Call:
    """One call with gradients in the forward pass; rows of the per-token tensors."""

    _numbers = itertools.count()
    running: dict[int, _Call] = {}  # noqa: RUF012  (calls in progress, by number)

    def __init__(
        self,
        library: statistics_ops.StatisticsOperators,
        fn: Callable[..., Tensor],
        rows: list[Tensor],
        target: Tensor | None,
        ignore_index: int,
        entropy: bool,
        logit_sum: bool,
    ) -> None:
        self.library, self.fn, self.rows = library, fn, rows
        self.entropy, self.logit_sum, self.vocab = entropy, logit_sum, 0
        self.ignored = None if target is None else _ignored(target, ignore_index)
        self.one_target = target is not None and target.dim() == 1
        self.target = target if target is None or target.dim() == 2 else target.unsqueeze(1)
        self.total: Tensor | None = None
        self.grad_rows = [torch.zeros_like(t) if t.requires_grad else None for t in rows]
        self.captured: dict[Tensor, Tensor] = {}

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        cast_to = _arguments.autocast_dtype(x.device)
        if cast_to is not None:
            x, weight = (_arguments.autocast_to(t, cast_to) for t in (x, weight))
            bias = None if bias is None else _arguments.autocast_to(bias, cast_to)
        _checks.check_dtypes(x, weight, bias, None, None)
        for name, tensor in (
            ("linear_weight", weight), ("target", self.target), ("linear_bias", bias),
        ):  # fmt: skip
            _checks.check_device(x.device, name, tensor)
        softcap = options["softcap"]
        _checks.check_numbers(0.0, softcap, options["logit_scale"], 0.0)
        self.vocab = len(weight)
        number = next(self._numbers)
        self.running[number] = self
        try:
            gradients = self.library.linear_loss_gradients(
                x.detach(),
                weight.detach(),
                self.target,
                None if bias is None else bias.detach(),
                handle=number,
                ignore_index=options["ignore_index"],
                softcap=0.0 if softcap is None else float(softcap),
                logit_scale=float(options["logit_scale"]),
                entropy=options["entropy"],
                logit_sum=options["logit_sum"],
                input_grad=x.requires_grad,
                weight_grad=weight.requires_grad,
                bias_grad=bias is not None and bias.requires_grad,
                memory_budget=_arguments.parse_memory_budget(options["memory_budget"]),
                chunk_size=_arguments.parse_chunk_size(options["chunk_size"]),
            )
        finally:
            del self.running[number]
        if self.total is None:  # no token counts: fn of none, for the parameters it closes over
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            none = x.new_zeros((0,), dtype=wide)
            targets = 0 if self.target is None else self.target.shape[1]
            self.differentiate(0, none.new_zeros((0, targets)), none, none, none, none)
        assert self.total is not None
        pairs = [
            *zip((x, weight, bias), gradients, strict=True),
            *zip(self.rows, self.grad_rows, strict=True),
            *self.captured.items(),
        ]
        needed = [(t, g) for t, g in pairs if t is not None and t.requires_grad and g is not None]
        total: Tensor = ReadyGradients.apply(
            self.total, [g for _, g in needed], *(t for t, _ in needed)
        )
        return total

    def differentiate(
        self,
        begin: int,
        logprob: Tensor,
        lse: Tensor,
        entropy: Tensor,
        logit_sum: Tensor,
        max_logit: Tensor,
    ) -> list[Tensor]:
        """Upstream gradients of one chunk's statistics; adds its losses to the total."""
        tokens = slice(begin, begin + len(lse))
        wide = logprob.dtype
        leaves = [logprob.detach(), lse.to(wide)]
        if self.entropy:
            leaves.append(entropy.to(wide))
        if self.logit_sum:
            leaves.append(logit_sum.detach())
        with torch.enable_grad():
            leaves = [leaf.requires_grad_() for leaf in leaves]
            number = node_number(lse.device)
            statistics = LogitStatistics(
                logprob=None if self.target is None else
                leaves[0].squeeze(1) if self.one_target else leaves[0],
                lse=leaves[1],
                entropy=leaves[2] if self.entropy else None,
                max_logit=max_logit,
                argmax=None,
                logit_sum=leaves[-1] if self.logit_sum else None,
                mean_logit=leaves[-1] / self.vocab if self.logit_sum else None,
                log_sum_sq_probs=None,
                top_logprobs=None,
                top_ids=None,
            )  # fmt: skip
            chunks = [t[tokens].detach().requires_grad_(t.requires_grad) for t in self.rows]
            losses = _checked(self.fn(statistics, *chunks), len(lse))
            if self.ignored is not None:
                losses = losses.masked_fill(self.ignored[tokens], 0)
            loss = losses.sum()
        self.total = loss.detach() if self.total is None else self.total + loss.detach()
        if not loss.requires_grad:
            return [torch.zeros_like(leaf) for leaf in leaves]
        own = [*leaves, *(chunk for chunk in chunks if chunk.requires_grad)]
        try:
            others = captured_leaves(loss, own, number)
        except CapturedResult as node:
            raise RuntimeError(
                f"fn closes over a result ({node}) of other differentiable computations, "
                "expected parameters only; pass it as a per-token tensor, or use "
                "memeff.linear_token_statistics"
            ) from None
        inputs = [*own, *others]
        gradients = dict(
            zip(inputs, torch.autograd.grad(loss, inputs, allow_unused=True), strict=True)
        )
        for whole, chunk in zip(self.grad_rows, chunks, strict=True):
            gradient = gradients.get(chunk)
            if whole is not None and gradient is not None:
                whole[tokens] = self._of_counted(gradient, tokens)
        for leaf in others:
            add_gradient(self.captured, leaf, gradients[leaf])
        result = []
        for leaf in leaves:
            gradient = gradients[leaf]
            gradient = torch.zeros_like(leaf) if gradient is None else gradient
            result.append(self._of_counted(gradient, tokens))
        return result

    def _of_counted(self, gradient: Tensor, tokens: slice) -> Tensor:
        """The gradient with zeros for ignored tokens, whatever fn made of their zeros."""
        if self.ignored is None:
            return gradient
        rows = self.ignored[tokens].reshape(-1, *[1] * (gradient.dim() - 1))
        return gradient.masked_fill(rows, 0)


def _differentiate_chunk(handle: int, begin: int, *statistics: Tensor) -> list[Tensor]:
    return _Call.running[handle].differentiate(begin, *statistics)


torch.library.impl("memeff::differentiate_chunk", "CompositeExplicitAutograd")(_differentiate_chunk)
