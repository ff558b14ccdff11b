"""The options of a call stand in few places, and these agree: public signatures, the types that
users write, the checked options, the operators and the reference.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import memeff
from memeff import _options, modules, ops, statistics_ops
from memeff._call import Call
from memeff._remember import remember

# Arguments of linear_cross_entropy that belong to one call, which no module keeps.
OF_ONE_CALL = {
    "input", "linear_weight", "target", "linear_bias", "weight", "token_weight", "num_items",
    "return_statistics",
}  # fmt: skip


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def test_signature_and_types_agree() -> None:
    shown = parameters(memeff.linear_cross_entropy)
    written = {
        name: getattr(hint, "__forward_arg__", hint)
        for name, hint in _options.LossOptions.__annotations__.items()
    }
    assert {name: shown[name].annotation for name in shown if name not in OF_ONE_CALL} == written


def test_defaults_agree() -> None:
    for function in (
        memeff.linear_cross_entropy, memeff.linear_token_statistics, memeff.linear_logprobs,
        memeff.linear_loss, memeff.plan,
    ):  # fmt: skip
        defaults = {
            name: parameter.default
            for name, parameter in parameters(function).items()
            if name in _options.Options._fields
        }
        assert len(defaults) > 5
        parsed = _options.parse_options(**defaults)
        for name in defaults:
            if name not in ("entropy", "argmax"):  # functions differ in these
                assert getattr(parsed, name) == getattr(_options.Options(), name), (function, name)


def test_operators_and_reference_take_what_a_call_has() -> None:
    library, statistics = ops.LIBRARIES["cpu"], statistics_ops.LIBRARIES["cpu"]
    for names in (library.loss_options, statistics.statistics_options, statistics.loss_options):
        for name in names:
            _options.Options().of_operators(name)
    for function in (
        memeff.reference.linear_cross_entropy, memeff.reference.linear_token_statistics
    ):  # fmt: skip
        assert set(parameters(function)) <= {*_options.Options._fields, *Call._fields}


def test_help_of_the_module_shows_the_options() -> None:
    shown = parameters(memeff.LinearCrossEntropyLoss)
    assert "options" in shown and not any(p.kind is p.VAR_KEYWORD for p in shown.values())
    for name, parameter in parameters(memeff.linear_cross_entropy).items():
        if name not in OF_ONE_CALL:
            assert shown[name] == parameter


def vocab_parallel() -> memeff.VocabParallel:
    """As if there were a process group."""
    shared = object.__new__(memeff.VocabParallel)
    object.__setattr__(shared, "group_name", "ranks")
    return shared


OTHERS: dict[str, Any] = {
    "reduction": "sum", "ignore_index": 3, "label_smoothing": 0.3, "softcap": 2.0,
    "logit_scale": 0.5, "z_loss": 0.2, "shift": 1, "memory_budget": "8MiB", "chunk_size": 16,
    "accum_dtype": torch.float32, "skip_mass": 0.1, "backend": "reference",
    "options": SimpleNamespace(batch_chunk_size=8), "vocab_parallel": vocab_parallel(),
}  # fmt: skip


def test_every_option_of_the_module_reaches_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OTHERS.keys() == _options.LossOptions.__annotations__.keys()
    received: dict[str, Any] = {}
    monkeypatch.setattr(modules, "linear_cross_entropy", lambda *_, **given: received.update(given))
    x, target = torch.randn(2, 3, 6), torch.randint(13, (2, 3))
    for name, value in OTHERS.items():
        module = memeff.LinearCrossEntropyLoss(6, 13, **{name: value})
        module(x, target)
        assert received[name] is value and getattr(module, name) is value, name
        assert f"{name}={value!r}" in module.extra_repr()
        module = memeff.LinearCrossEntropyLoss(6, 13)
        setattr(module, name, value)
        module(x, target)
        assert received[name] is value, name


def test_options_that_are_equal_but_of_another_type_are_checked() -> None:
    """Checked options are kept: True must not be taken for the 1.0 of an earlier call."""
    assert _options.parse_options(label_smoothing=1.0).label_smoothing == 1.0
    with pytest.raises(TypeError, match="label_smoothing must be a number, got bool"):
        _options.parse_options(label_smoothing=True)
    assert _options.parse_options(shift=True).shift == 1
    with pytest.raises(TypeError, match="shift must be an int"):
        _options.parse_options(shift=1.0)


def test_repeated_arguments_are_remembered() -> None:
    """But not those that are not hashable, nor errors."""
    seen: list[Any] = []

    @remember
    def listed(values: Any) -> list[Any]:
        seen.append(values)
        return list(values)

    assert listed((1, 2)) is listed((1, 2))
    assert listed([1, 2]) == listed([1, 2]) == [1, 2]
    for _ in range(2):
        with pytest.raises(TypeError, match="not iterable"):
            listed(3)
    assert seen == [(1, 2), [1, 2], [1, 2], 3, 3, 3, 3]


@pytest.mark.parametrize("kind", [Call, _options.Options])
def test_torch_compile_traces_calls(kind: type) -> None:
    """In torch 2.10 it refuses properties of NamedTuples."""
    assert not [name for name, value in vars(kind).items() if isinstance(value, property)]
