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
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from memeff import _positions, statistics_ops
from memeff._call import Call, denominator_of, statistics_call
from memeff._checks import check_callable
from memeff._gradient_sums import ReadyGradients
from memeff._gradients import (
    CapturedResult,
    add_gradient,
    captured_leaves,
    node_number,
    outside_of_graphs,
    refuse_tangents,
    refuse_vmap,
)
from memeff._operands import check_per_token
from memeff.statistics import LogitStatistics
from memeff.token_statistics import compute_statistics
from memeff.vocab_parallel import VocabParallel, reporting

__all__ = ["linear_loss"]


def linear_loss(
    fn: Callable[..., Tensor],
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    *per_token_tensors: Tensor,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    logit_sum: bool = False,
    memory_budget: int | str | None = None,
    chunk_size: int | None = None,
    vocab_parallel: VocabParallel | None = None,
    backend: str = "auto",
) -> Tensor:
    """The loss ``fn(statistics, *chunks)`` of every token, reduced, without storing the logits.

    ``fn`` gets the `memeff.LogitStatistics` of c tokens (``logprob`` [c] or [c, K], ``lse`` [c],
    ``max_logit`` [c], and if asked for ``entropy`` [c], ``logit_sum`` [c] and ``mean_logit`` [c])
    and the same c rows of each of ``per_token_tensors``; it returns their losses, [c]. A token's
    loss must depend on that token alone; what goes beyond (sequence-level ratios, say) takes
    `memeff.linear_token_statistics`.

    With a K-dimensional weight [V, d1, ..., dK, D] each of the d1 * ... * dK positions of a token
    counts as a token of its own: target and ``per_token_tensors`` are [..., d1, ..., dK, *], and
    ``fn`` is called with one position at a time.

    Tokens whose target (each of whose targets) is ``ignore_index`` are never looked at: all
    statistics that ``fn`` gets of them are 0, and whatever it returns for them, their losses and
    gradients are 0.

    Gradients flow to ``input``, ``linear_weight``, ``linear_bias``, ``per_token_tensors``, and
    parameters that ``fn`` closes over. They are computed in the forward pass, with three exceptions
    that recompute the scores: float16, whose gradients could underflow before a loss scale is
    applied; ``reduction="none"``; and on GPUs several targets per token.

    Args:
        input, linear_weight, target, linear_bias, ignore_index, softcap, logit_scale, temperature,
            entropy, logit_sum, memory_budget, chunk_size, vocab_parallel, backend: as in
            `linear_token_statistics`.
        fn: as above; it is called once per chunk of tokens.
        reduction: "mean": the sum divided by the number of tokens with a target other than
            ``ignore_index`` (by that of all tokens without targets), at least by 1; "sum"; or
            "none": the loss of every token.
        num_items: with "mean", the denominator in place of that number: a number or a tensor with
            one. For gradient accumulation over several calls. 0 counts as 1.

    Returns:
        The loss, 0-d or per token, float32 (float64 for float64 inputs). Second derivatives raise
        an error.
    """
    call = statistics_call(
        input,
        linear_weight,
        target,
        linear_bias,
        reduction=reduction,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        entropy=entropy,
        logit_sum=logit_sum,
        skip_ignored=target is not None,
        memory_budget=memory_budget,
        chunk_size=chunk_size,
        vocab_parallel=vocab_parallel,
        backend=backend,
    )
    named = {f"per_token_tensors[{i}]": tensor for i, tensor in enumerate(per_token_tensors)}
    positions = call.linear_weight.shape[1:-1]

    def check() -> Tensor | None:
        check_callable("fn", fn)
        if 0 in positions:
            shape = tuple(linear_weight.shape)
            raise RuntimeError(f"linear_weight has shape {shape}, expected at least one position")
        check_per_token(named, input, positions=positions)
        return denominator_of(num_items, reduction, input.device)

    denominator = reporting(call.options.vocab_parallel, check)
    lead, call = input.shape[:-1], call.of_rows()
    tokens, count = lead.numel(), positions.numel()
    rows = [t.reshape(tokens, count, *t.shape[len(lead + positions) :]) for t in per_token_tensors]
    calls = _positions.split(call) if positions else [call]
    losses = [
        _of_position(one, fn, [t[:, i] for t in rows], list(named)) for i, one in enumerate(calls)
    ]
    if reduction == "none":
        return torch.stack(losses, 1).reshape(lead + positions)
    total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    if reduction == "sum":
        return total
    if denominator is not None:
        return total / denominator.to(total.dtype)
    if call.target is None:
        return total / (tokens * count)
    several = call.target.dim() > 1 + len(positions)
    counted = ~_ignored(call.target, call.options.ignore_index, several)
    return total / counted.sum().clamp(min=1)


def _of_position(
    call: Call, fn: Callable[..., Tensor], rows: list[Tensor], names: list[str]
) -> Tensor:
    """The sum of the losses, or all [N], of input [N, D] and linear_weight [V, D]."""
    target, tokens = call.target, len(call.input)
    ignored = None
    if target is not None:
        ignored = _ignored(target, call.options.ignore_index, target.dim() > 1)
    if _can_stop(call):
        refuse_tangents(dict(zip(names, rows, strict=True)))
        return outside_of_graphs(_Run(call, fn, rows, ignored).run)()
    losses = _checked(fn(compute_statistics(call), *rows), tokens)
    if ignored is not None:
        losses = losses.masked_fill(ignored, 0)
    return losses if call.options.reduction == "none" else losses.sum()


def _ignored(target: Tensor, ignore_index: int, several: bool) -> Tensor:
    """Which tokens have no target; ``several``: per token, in the last dimension."""
    none = target == ignore_index
    return none.all(-1) if several else none


def _can_stop(call: Call) -> bool:
    """Whether gradients are wanted that the backend can compute while it has a chunk's scores."""
    if call.options.reduction == "none" or not any(call.keywords(()).values()):
        return False
    sharded = call.options.vocab_parallel is not None  # of several ranks, all or none can
    if call.input.numel() == 0 or (call.linear_weight.numel() == 0 and not sharded):
        return False
    if call.input.dtype == torch.float16:
        return False  # gradients could underflow before a loss scale is applied
    if call.backend == "reference":
        return False
    target = call.target
    one = target is None or target.dim() == 1 or target.shape[1] == 1
    return one or call.backend == "cpu"


def _checked(losses: Tensor, tokens: int) -> Tensor:
    if not isinstance(losses, Tensor) or losses.shape != (tokens,):
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses)
        raise RuntimeError(f"fn returned {got} for {tokens} tokens, expected shape ({tokens},)")
    return losses


class _Run:
    """One call with gradients in the forward pass, of rows [N, D]; and rows of the per-token
    tensors."""

    _numbers = itertools.count()
    running: dict[int, _Run] = {}  # noqa: RUF012  (calls in progress, by number)

    def __init__(
        self, call: Call, fn: Callable[..., Tensor], rows: list[Tensor], ignored: Tensor | None
    ) -> None:
        self.call, self.fn, self.rows, self.ignored = call, fn, rows, ignored
        self.total: Tensor | None = None
        self.classes: int | Tensor | None = None
        self.grad_rows = [torch.zeros_like(t) if t.requires_grad else None for t in rows]
        self.captured: dict[Tensor, Tensor] = {}

    def run(self) -> Tensor:
        call, library = self.call, statistics_ops.LIBRARIES[self.call.backend]
        x, weight, bias, target = call.input, call.linear_weight, call.linear_bias, call.target
        if target is not None and target.dim() == 1:
            target = target.unsqueeze(1)
        if not torch.compiler.is_compiling() and any(
            t is not None and is_batchedtensor(t) for t in (x, weight, bias, target)
        ):
            refuse_vmap()
        self.handle = next(self._numbers)
        self.running[self.handle] = self
        try:
            gradients = library.linear_loss_gradients(
                x.detach(),
                weight.detach(),
                target,
                None if bias is None else bias.detach(),
                call.scale_number(),
                call.temperature,
                handle=self.handle,
                **call.keywords(library.loss_options),
            )
        finally:
            del self.running[self.handle]
        if self.total is None:  # no token counts: fn of none, for the parameters it closes over
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            none = x.new_zeros((0,), dtype=wide)
            targets = 0 if target is None else target.shape[1]
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
        target, options = self.call.target, self.call.options
        if options.entropy:
            leaves.append(entropy.to(wide))
        if options.logit_sum:
            leaves.append(logit_sum.detach())
        with torch.enable_grad():
            leaves = [leaf.requires_grad_() for leaf in leaves]
            number = node_number(lse.device)
            statistics = LogitStatistics(
                logprob=None if target is None else
                leaves[0].squeeze(1) if target.dim() == 1 else leaves[0],
                lse=leaves[1],
                entropy=leaves[2] if options.entropy else None,
                max_logit=max_logit,
                argmax=None,
                logit_sum=leaves[-1] if options.logit_sum else None,
                mean_logit=leaves[-1] / self._classes() if options.logit_sum else None,
                log_sum_sq_probs=None,
                top_logprobs=None,
                top_ids=None,
            )  # fmt: skip
            chunks = [t[tokens].detach().requires_grad_(t.requires_grad) for t in self.rows]
            losses = _checked(self.fn(statistics, *chunks), len(lse))
            if self.ignored is not None:
                losses = losses.masked_fill(self.ignored[tokens], 0)
            loss = losses.sum()
        refuse_tangents({"result of fn": loss})
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

    def _classes(self) -> int | Tensor:
        if self.classes is None:
            self.classes = self.call.count_classes()
        return self.classes

    def _of_counted(self, gradient: Tensor, tokens: slice) -> Tensor:
        """The gradient with zeros for ignored tokens, whatever fn made of their zeros."""
        if self.ignored is None:
            return gradient
        rows = self.ignored[tokens].reshape(-1, *[1] * (gradient.dim() - 1))
        return gradient.masked_fill(rows, 0)


def _differentiate_chunk(handle: int, begin: int, *statistics: Tensor) -> list[Tensor]:
    with _autograd():
        return _Run.running[handle].differentiate(begin, *statistics)


def _autograd() -> Any:
    """A context with autograd, which a TorchDispatchMode (of a FLOP counter) excludes in ops."""
    key = torch._C.DispatchKey.AutogradFunctionality
    if torch._C._dispatch_tls_is_dispatch_key_excluded(key):
        return torch._C._SetExcludeDispatchKeyGuard(key, False)
    return nullcontext()


torch.library.impl("memeff::differentiate_chunk", "CompositeExplicitAutograd")(_differentiate_chunk)
