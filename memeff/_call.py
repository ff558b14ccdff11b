"""``Call``: the checked tensors and options of one call, and the operators that compute it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memeff import ops, reference
from memeff._backends import resolve_backend
from memeff._dtensor import is_dtensor, local_operands
from memeff._gradients import records_tangents, refuse_tangents
from memeff._logit_scale import take_scale, tie
from memeff._operands import (
    check_classes,
    check_head,
    check_loss_target,
    check_statistics_target,
    check_temperature,
    check_weights,
    parse_num_items,
)
from memeff._options import Options, check_accum_dtype, merge_torch_options, parse_options
from memeff._remember import remember
from memeff.vocab_parallel import parse_vocab_parallel, reporting

__all__ = ["Call", "RowResults", "call_loss", "denominator_of", "loss_call", "statistics_call"]


class Call(NamedTuple):
    """One call. Shapes are those of the public functions, or of rows where functions say so:
    input [N, D], linear_weight [V, D], target [N], [N, V] or [N, K].
    """

    input: Tensor  # [..., D]
    linear_weight: Tensor  # [V, d1, ..., dK, D]
    target: Tensor | None
    linear_bias: Tensor | None  # [V, d1, ..., dK]
    options: Options
    backend: str  # that computes
    weight: Tensor | None = None  # class weights [V]
    token_weight: Tensor | None = None
    num_items: Tensor | None = None  # []
    probabilities: bool = False  # what target holds
    scale: Tensor | None = None  # [], a logit_scale that is a tensor
    temperature: Tensor | None = None  # [...], of each token of statistics

    def keywords(self, names: Sequence[str]) -> dict[str, Any]:
        """The options that an op has, by their names.

        Ops compute gradients in their forward, so they must know which ones are wanted.
        """
        grad, bias = torch.is_grad_enabled(), self.linear_bias
        wanted = {
            "input_grad": grad and self.input.requires_grad,
            "weight_grad": grad and self.linear_weight.requires_grad,
            "bias_grad": grad and bias is not None and bias.requires_grad,
        }
        return wanted | _values(self.options, names)

    def count_classes(self) -> int | Tensor:
        """V, of all ranks that share the vocabulary; they ask each other, so all of them call."""
        here, shared = self.linear_weight.shape[0], self.options.vocab_parallel
        if shared is None:
            return here
        own = torch.full((), here, dtype=torch.int64, device=self.input.device)
        return shared.add_up(own)

    def scale_number(self) -> Tensor | None:
        """The scale as operators take it: see memeff/_logit_scale.py."""
        return None if self.scale is None else self.scale.detach()

    def of_rows(self) -> Call:
        """The same for input [N, D]: what has an entry per token has N of them."""
        lead = self.input.shape[:-1]
        tokens = lead.numel()
        target, temperature = (
            None if t is None else t.reshape(tokens, *t.shape[len(lead) :])
            for t in (self.target, self.temperature)
        )
        input = self.input.reshape(tokens, self.input.shape[-1])
        return self._replace(input=input, target=target, temperature=temperature)

    def needs_reference(self) -> bool:
        """Whether plain PyTorch computes it. Without classes there are no logits to avoid, and the
        kernels need not know the case, unless other ranks have the classes."""
        no_classes = 0 in self.linear_weight.shape[:-1] and self.options.vocab_parallel is None
        return self.backend == "reference" or no_classes

    def of_reference(self, function: Callable[..., Any]) -> Any:
        """The result of a function of memeff.reference."""
        of_call, of_options = _PARAMETERS[function]
        options = {name: getattr(self.options, name) for name in of_options}
        if self.scale is not None:
            options["logit_scale"] = self.options.logit_scale * self.scale
        with torch.autocast(self.input.device.type, enabled=False):
            return function(**{name: getattr(self, name) for name in of_call}, **options)


@remember
def _values(options: Options, names: Sequence[str]) -> dict[str, Any]:
    return {name: options.of_operators(name) for name in names}


def _parameters(function: Callable[..., Any], fields: tuple[str, ...]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name in fields]


# Which fields of a call and of its options the functions of memeff.reference take.
_PARAMETERS = {
    function: (_parameters(function, Call._fields), _parameters(function, Options._fields))
    for function in (reference.linear_cross_entropy, reference.linear_token_statistics)
}


class RowResults(NamedTuple):
    """What the op of the loss returns apart from the gradients, for N rows."""

    loss: Tensor  # [] or, without reduction, [N]
    lse: Tensor  # [N] fp64: exp(z - lse) would inherit the rounding of a large lse
    statistics: Tensor  # [4, N]: loss, target logit, entropy, max logit; or empty
    argmax: Tensor  # [N] or empty


@functools.cache
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _sharing(make: Callable[..., Call]) -> Callable[..., Call]:
    """Makes calls on a vocabulary that ranks share: DTensors become local tensors, and an error of
    one rank ends the call of all, which would otherwise wait for it."""

    @functools.wraps(make)
    def make_shared(*tensors: Any, **given: Any) -> Call:
        shared = given.get("vocab_parallel")
        sharded = is_dtensor(tensors[1])
        if shared is None and not sharded:
            return make(*tensors, **given)
        parse_vocab_parallel("vocab_parallel", shared)
        if sharded:
            operands, shared = local_operands(
                dict(zip(_names(make), tensors, strict=False)), shared
            )
            tensors, given = tuple(operands.values()), {**given, "vocab_parallel": shared}

        def checked() -> Call:
            call = make(*tensors, **given)
            _check_sharded(call)
            return call

        return reporting(shared, checked)

    return make_shared


def _check_sharded(call: Call) -> None:
    """What is not there for a vocabulary that ranks share."""
    if call.backend == "reference":
        raise NotImplementedError(
            'backend is "reference" (or a gradient is wanted that only the reference computes), '
            "expected another one with vocab_parallel: the reference knows one process"
        )


@_sharing
def loss_call(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: Any,
    torch_options: Any,
    **given: Any,
) -> Call:
    """Checks and normalises the arguments of `memeff.linear_cross_entropy`."""
    input, linear_weight, linear_bias = check_head(
        input, linear_weight, linear_bias, positions=True
    )
    probabilities = check_loss_target(input, linear_weight, target)
    if weight is not None:
        check_weights("weight", weight, linear_weight.shape[:1], "class", input)
    if token_weight is not None:
        tokens = input.shape[:-1] + linear_weight.shape[1:-1]
        check_weights("token_weight", token_weight, tokens, "token", input)
    if probabilities and given["ignore_index"] is not None:
        raise RuntimeError(
            f"ignore_index is {given['ignore_index']}, expected None: target holds class "
            "probabilities, which have no index to ignore"
        )
    if torch_options is not None:
        given = merge_torch_options(given, torch_options, input.dtype)
    given, scale = take_scale(given)
    options = parse_options(**given)
    check_accum_dtype(options.accum_dtype, input.dtype)
    if options.shift:
        _check_shift(options.shift, input)
    if options.return_statistics and options.vocab_parallel is None:
        check_classes(linear_weight)
    only_reference = False
    if torch.is_grad_enabled():
        only_reference = _needs_reference(target, weight, token_weight, probabilities)
    backend = resolve_backend(options.backend, input.device, only_reference)
    call = Call(
        input,
        linear_weight,
        target,
        linear_bias,
        options,
        backend,
        weight,
        token_weight,
        denominator_of(num_items, options.reduction, input.device),
        probabilities,
        scale,
    )
    tensors = {"target": target, "weight": weight, "token_weight": token_weight}
    return _differentiable(call, tensors | {"num_items": num_items})


def _needs_reference(
    target: Tensor, weight: Tensor | None, token_weight: Tensor | None, probabilities: bool
) -> bool:
    """Whether only the reference computes a wanted gradient; an error where nothing does."""
    if token_weight is not None and token_weight.requires_grad:
        raise RuntimeError(
            "token_weight requires grad, expected one that does not: detach it, or multiply the "
            'result of reduction="none" by it'
        )
    weight_grad = weight is not None and weight.requires_grad
    if weight_grad and not probabilities:
        raise RuntimeError(
            "weight requires grad, expected one that does not: as in torch, the loss of class "
            "indices is not differentiable with respect to the class weights"
        )
    return weight_grad or target.requires_grad


@_sharing
def statistics_call(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    linear_bias: Tensor | None,
    *,
    temperature: float | Tensor = 1.0,
    **given: Any,
) -> Call:
    """Checks and normalises the arguments of functions of token statistics."""
    input, linear_weight, linear_bias = check_head(
        input, linear_weight, linear_bias, positions=True
    )
    if target is not None:
        check_statistics_target(input, linear_weight, target)
    given, scale = take_scale(given)
    options = parse_options(**given)
    check_temperature(temperature, input)
    per_token = None
    if isinstance(temperature, Tensor):
        per_token = temperature
    elif temperature != 1:
        # c tanh(s u / c) / T = (c / T) tanh((s / T) u / (c / T))
        options = options._replace(
            softcap=options.softcap / temperature, logit_scale=options.logit_scale / temperature
        )
    if target is None or target.numel() == 0:  # none is ignored
        options = options._replace(skip_ignored=False)
    # Other ranks may have the classes; then the operator, which knows them, checks top_k.
    sharded = options.vocab_parallel is not None
    if not sharded:
        check_classes(linear_weight)
    if options.top_k > linear_weight.shape[0] and not sharded:
        raise ValueError(
            f"top_k is {options.top_k}, expected a number of classes in "
            f"[0, {linear_weight.shape[0]}]"
        )
    if options.shift:
        if target is None:
            raise ValueError(f"shift is {options.shift}, expected 0: there is no target")
        _check_shift(options.shift, input)
    backend = resolve_backend(options.backend, input.device)
    call = Call(
        input,
        linear_weight,
        target,
        linear_bias,
        options,
        backend,
        scale=scale,
        temperature=per_token,
    )
    return _differentiable(call, {"temperature": temperature})


def _differentiable(call: Call, given: dict[str, Any]) -> Call:
    """The call with what gradients need that the kernels do not compute; an error where an argument
    of it or of what else was given has a tangent. The reference needs neither."""
    if call.backend == "reference":
        return call
    if records_tangents():
        names = ("input", "linear_weight", "linear_bias")
        head = {name: getattr(call, name) for name in names} | {"logit_scale": call.scale}
        refuse_tangents(head | given, '; backend="reference" has them')
    if call.scale is None:
        return call
    input, linear_bias = tie(call.input, call.linear_bias, call.scale, call.options.vocab_parallel)
    return call._replace(input=input, linear_bias=linear_bias)


def _check_shift(shift: int, input: Tensor) -> None:
    if input.dim() == 1:
        raise ValueError(
            f"shift is {shift}, expected 0 for an input of one row: there is no time dimension"
        )


def denominator_of(num_items: Any, reduction: str, device: torch.device) -> Tensor | None:
    """The denominator of the mean that replaces the number of tokens."""
    if num_items is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f'num_items is given with reduction={reduction!r}, expected reduction="mean", '
            "whose denominator it is"
        )
    return parse_num_items(num_items, device)


def call_loss(call: Call) -> RowResults:
    """The op of the loss, for rows of one position."""
    library = ops.LIBRARIES[call.backend]
    results = library.linear_cross_entropy_forward(
        call.input,
        call.linear_weight,
        call.target,
        call.linear_bias,
        call.weight,
        call.token_weight,
        call.num_items,
        call.scale_number(),
        **call.keywords(library.loss_options),
    )
    return RowResults(*results[:4])
