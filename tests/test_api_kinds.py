"""Arguments of the wrong kind, in every function: tensors that are not plain ones, flags that are
not bools, integers beyond 64 bits, functions that cannot be called; and what num_items may be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import memeff

N, D, V = 5, 6, 9
BIG = 2**63


def tensors(**changes: Any) -> dict[str, Any]:
    given = {
        "input": torch.randn(N, D), "linear_weight": torch.randn(V, D),
        "target": torch.randint(V, (N,)),
    }  # fmt: skip
    return given | changes


def cross_entropy(**changes: Any) -> Any:
    return memeff.linear_cross_entropy(**tensors(**changes))


def statistics(**changes: Any) -> Any:
    return memeff.linear_token_statistics(**tensors(**changes))


def logprobs(**changes: Any) -> Any:
    return memeff.linear_logprobs(**tensors(**changes))


def custom_loss(**changes: Any) -> Any:
    return memeff.linear_loss(**{"fn": lambda s: -s.logprob} | tensors(**changes))


def apply(**changes: Any) -> Any:
    given: dict[str, Any] = {"fn": lambda logits: logits.logsumexp(-1)} | tensors(**changes)
    del given["target"]
    return memeff.chunked_linear_apply(**given)


def memory_efficient_linear(**changes: Any) -> Any:
    names = {"input": "X", "linear_weight": "weight", "target": "labels"}
    given = {names.get(name, name): value for name, value in tensors(**changes).items()}
    given.setdefault(
        "forward_function", lambda hidden, linear, labels: F.cross_entropy(linear(hidden), labels)
    )
    return memeff.MemoryEfficientLinear.apply(**given)


def module(**changes: Any) -> Any:
    return memeff.LinearCrossEntropyLoss(**{"in_features": D, "num_classes": V} | changes)


def plan(**changes: Any) -> Any:
    given: dict[str, Any] = {"tokens": 10, "features": 10, "vocab": 10, "dtype": "float32"}
    return memeff.plan(**given | changes)


def name_of(value: Any) -> str:
    return str(getattr(value, "__name__", value))


FUNCTIONS = [cross_entropy, statistics, logprobs, custom_loss, apply, memory_efficient_linear]


class Quantised(torch.Tensor):
    """As the tensors of quantisation libraries, which compute their values when asked."""

    def dequantize(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


KINDS: dict[str, tuple[Callable[[torch.Tensor], Any], type[Exception], str]] = {
    "str": (lambda _: "abc", TypeError, "must be a torch.Tensor, got str"),
    "list": (lambda t: t.tolist(), TypeError, "must be a torch.Tensor, got list"),
    "sparse": (lambda t: t.to_sparse(), TypeError, r"layout torch.sparse_coo.*\.to_dense\(\)"),
    "csr": (lambda t: t.to_sparse_csr(), TypeError, r"layout torch.sparse_csr.*\.to_dense\(\)"),
    "nested": (
        lambda t: torch.nested.nested_tensor([t, t[:2]]), TypeError, r"nested tensor.*\.unbind\(\)",
    ),
    "jagged": (
        lambda t: torch.nested.nested_tensor([t, t[:2]], layout=torch.jagged), TypeError,
        r"nested tensor.*\.unbind\(\)",
    ),
    "quantised subclass": (
        lambda t: t.as_subclass(Quantised), TypeError, r"is a Quantised.*\.dequantize\(\)",
    ),
    "quantised": (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), RuntimeError,
        r"dtype torch.qint8.*\.dequantize\(\)",
    ),
    "float8": (
        lambda t: t.to(torch.float8_e4m3fn), RuntimeError,
        "dtype torch.float8_e4m3fn.*pass the dequantised one",
    ),
    "int8": (lambda t: t.to(torch.int8), RuntimeError, "dtype torch.int8.*pass the dequantised"),
    "bool": (lambda t: t.bool(), RuntimeError, "dtype torch.bool, expected"),
    "complex": (lambda t: t.cfloat(), RuntimeError, "dtype torch.complex64, expected"),
    "sharded": (lambda t: t.flatten(), RuntimeError, "has shape|features"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("argument", ["input", "linear_weight"])
def test_tensors_of_another_kind(kind: str, argument: str) -> None:
    make, error, message = KINDS[kind]
    for function in FUNCTIONS:
        value = make(tensors()[argument])
        with pytest.raises(error, match=message) as caught:
            function(**{argument: value})
        names = {"input": "X", "linear_weight": "weight"}
        name = names[argument] if function is memory_efficient_linear else argument
        assert name in str(caught.value), function


def test_subclasses_without_data_of_their_own_pass() -> None:
    class Plain(torch.Tensor):
        pass

    given = tensors()
    expected = memeff.linear_cross_entropy(**given)
    given["linear_weight"] = given["linear_weight"].as_subclass(Plain)
    assert torch.equal(memeff.linear_cross_entropy(**given), expected)


FLAGS: list[tuple[Callable[..., Any], str]] = [
    (cross_entropy, "return_statistics"),
    *((statistics, name) for name in ("entropy", "argmax", "logit_sum", "log_sum_sq_probs")),
    (custom_loss, "entropy"), (custom_loss, "logit_sum"),
    (apply, "upcast"), (apply, "recompute"),
    *((plan, name) for name in ("bias_grad", "input_grad", "probabilities", "return_statistics")),
]  # fmt: skip


@pytest.mark.parametrize(("function", "flag"), FLAGS, ids=name_of)
def test_flags_are_bools(function: Callable[..., Any], flag: str) -> None:
    for value in (1, "no", torch.tensor(True), []):
        with pytest.raises(TypeError, match=f"{flag} must be a bool, got {type(value).__name__}"):
            function(**{flag: value})


INTEGERS: list[tuple[Callable[..., Any], str]] = [
    *((cross_entropy, name) for name in ("ignore_index", "shift", "memory_budget", "chunk_size")),
    *((statistics, name) for name in ("ignore_index", "shift", "top_k", "memory_budget")),
    *((custom_loss, name) for name in ("ignore_index", "memory_budget", "chunk_size")),
    (apply, "memory_budget"), (apply, "chunk_size"),
    (memory_efficient_linear, "chunk_size"), (memory_efficient_linear, "ignore_index"),
    (module, "shift"), (module, "chunk_size"),
    *((plan, name) for name in ("tokens", "features", "vocab", "memory_budget", "chunk_size")),
]  # fmt: skip


@pytest.mark.parametrize(("function", "name"), INTEGERS, ids=name_of)
def test_integers_have_64_bits(function: Callable[..., Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is {BIG}, expected .*64 bits"):
        function(**{name: BIG})
    for value in (1.5, [], {}):
        with pytest.raises(TypeError, match=f"{name} must be an int"):
            function(**{name: value})


@pytest.mark.parametrize("name", ["z_loss", "logit_scale", "softcap", "label_smoothing"])
def test_numbers_are_finite_floats(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 1000.*, expected"):
        cross_entropy(**{name: 10**400})
    with pytest.raises(TypeError, match=f"{name} must be a number, got bool"):
        cross_entropy(**{name: True})


@pytest.mark.parametrize("capability", [9, (9,), (9, True), [9, 0], "90", (9.0, 0)], ids=str)
def test_compute_capability_is_a_pair(capability: Any) -> None:
    with pytest.raises(TypeError, match="compute_capability must be a tuple of two ints"):
        plan(compute_capability=capability)


@pytest.mark.parametrize("capability", [(7, 0), (10**30, 0), (9, 10), (9, -1)], ids=str)
def test_compute_capability_exists(capability: Any) -> None:
    with pytest.raises(ValueError, match=r"compute_capability is .*expected .7, 5. or newer"):
        plan(compute_capability=capability)


def test_plans_count_bytes_in_64_bits() -> None:
    with pytest.raises(ValueError, match="bytes can be counted in 64 bits"):
        plan(tokens=2**40, vocab=2**40)


def test_functions_can_be_called() -> None:
    for function, name in (
        (custom_loss, "fn"), (apply, "fn"), (memory_efficient_linear, "forward_function"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"{name} must be callable, got int 3"):
            function(**{name: 3})


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"target": [1]}, TypeError, "target must be a torch.Tensor, got list"),
        ({"target": torch.zeros(N)}, RuntimeError, "target has dtype torch.float32, expected"),
        ({"target": torch.zeros(2).long()}, RuntimeError, r"target has shape \(2,\), expected"),
        ({"linear_bias": [1.0]}, TypeError, "linear_bias must be a torch.Tensor, got list"),
        ({"linear_bias": torch.ones(3)}, RuntimeError, r"linear_bias has shape \(3,\), expected"),
        ({"ignore_index": "a"}, TypeError, "ignore_index must be an int, .*got str"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale is 0.0, expected"),
        ({"linear_weight": torch.ones(0, D)}, RuntimeError, "expected at least one class"),
    ],
    ids=str,
)  # fmt: skip
def test_statistics_and_custom_losses(
    changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    for function in (statistics, logprobs, custom_loss):
        with pytest.raises(kind, match=message):
            function(**changes)


def test_ignore_index_none_is_that_of_torch() -> None:
    target = torch.tensor([0, -100, 2, -100, 1])
    given = tensors(target=target)
    for name in ("linear_token_statistics", "linear_logprobs"):
        function = getattr(memeff, name)
        for a, b in zip(function(**given), function(**given, ignore_index=None), strict=True):
            assert a is b is None or torch.equal(a, b)
    fn = {"fn": lambda s: -s.logprob}
    expected = memeff.linear_loss(**fn, **given)
    assert torch.equal(memeff.linear_loss(**fn, **given, ignore_index=None), expected)


def test_statistics_need_a_class() -> None:
    """A loss of ignored tokens exists without classes, as in torch; statistics do not."""
    changes = {"linear_weight": torch.ones(0, D), "target": torch.full((N,), -100)}
    assert cross_entropy(**changes, reduction="sum") == 0
    with pytest.raises(RuntimeError, match=r"shape \(0, 6\), expected at least one class"):
        cross_entropy(**changes, return_statistics=True)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"weight": [1.0] * V}, TypeError, "weight must be a torch.Tensor, got list"),
        ({"out_features": 3}, TypeError, "out_features must be a tuple of ints, got int 3"),
        ({"shft": 1}, TypeError, "unexpected keyword argument 'shft'"),
        ({"skip_mass": 1.0}, ValueError, r"skip_mass is 1.0, expected a probability in \[0, 1\)"),
        ({"backend": "tpu"}, ValueError, "backend is 'tpu', expected one of"),
        ({"options": 3}, TypeError, "options must be a torch.nn.LinearCross.* or None, got int"),
        ({"bias": None}, TypeError, "bias must be a bool, got NoneType None"),
        ({"in_features": 6.0}, TypeError, "in_features must be an int, .*got float"),
        ({"num_classes": True}, TypeError, "num_classes must be an int, .*got bool"),
        ({"num_classes": -1}, ValueError, "num_classes is -1, expected a number of classes >= 0"),
        ({"weight": torch.ones(V).long()}, RuntimeError, "weight has dtype torch.int64, expected"),
    ],
    ids=str,
)  # fmt: skip
def test_module(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        module(**changes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["quantised", "float8", "int8", "bool", "complex", "sparse", "str"]
)
@pytest.mark.parametrize("name", ["linear_weight", "linear_bias"])
def test_module_of_tensors_of_another_kind(kind: str, name: str) -> None:
    make, error, message = KINDS[kind]
    shared = {"linear_weight": torch.randn(V, D), "linear_bias": torch.randn(V)}
    with pytest.raises(error, match=f"{name} .*{message}"):
        memeff.LinearCrossEntropyLoss(**shared | {name: make(shared[name])})


@pytest.mark.parametrize("shape", [(0,), (V * D,)], ids=str)
def test_module_of_a_sharded_weight(shape: tuple[int, ...]) -> None:
    """What ZeRO-3 and FSDP1 leave of a weight between forwards."""
    head = torch.nn.Linear(D, V)
    head.weight = torch.nn.Parameter(torch.ones(shape))
    with pytest.raises(RuntimeError, match=r"linear has a weight of shape .* construct .*Gathered"):
        memeff.LinearCrossEntropyLoss(linear=head)


def test_one_row_and_a_result_per_token() -> None:
    x, w = torch.randn(D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    for recompute in (None, True):
        lse = memeff.chunked_linear_apply(lambda z: z.logsumexp(-1), x, w, recompute=recompute)
        wide = memeff.chunked_linear_apply(lambda z: z[:, :2], x, w, recompute=recompute)
        assert isinstance(lse, torch.Tensor) and isinstance(wide, torch.Tensor)
        logits = w @ x
        torch.testing.assert_close(lse, logits.logsumexp(0))
        torch.testing.assert_close(wide, logits[:2])
        found = torch.autograd.grad(lse, (x, w))
        for a, b in zip(found, torch.autograd.grad(logits.logsumexp(0), (x, w)), strict=True):
            torch.testing.assert_close(a, b)


NUMBERS = {
    "int": 7, "float": 7.0, "numpy int": np.int64(7), "numpy float": np.float32(7),
    "tensor": torch.tensor(7), "tensor of one": torch.tensor([7.0]),
    "tensor of float64": torch.tensor(7.0, dtype=torch.float64),
}  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(V, D), (V, 2, D)], ids=str)
def test_num_items(number: Any, backend: str, shape: tuple[int, ...]) -> None:
    target = torch.randint(V, (N, *shape[1:-1]))
    given = tensors(linear_weight=torch.randn(shape), target=target) | {"backend": backend}
    total = memeff.linear_cross_entropy(**given, reduction="sum")
    mean = memeff.linear_cross_entropy(**given, num_items=number)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, total / 7)
    if len(shape) == 2:
        fn = {"fn": lambda s: -s.logprob}
        mean = memeff.linear_loss(**fn, **given, num_items=number)
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean, total / 7)


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0), torch.tensor([0.0])], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_num_items_0_counts_as_1(zero: Any, backend: str) -> None:
    """A batch in which all tokens are masked has the loss 0 and gradients of 0."""
    x, w = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    target = torch.full((N,), -100)
    for loss in (
        memeff.linear_cross_entropy(x, w, target, num_items=zero, backend=backend),
        memeff.linear_loss(lambda s: -s.logprob, x, w, target, num_items=zero, backend=backend),
    ):
        assert loss == 0
        for gradient in torch.autograd.grad(loss, (x, w)):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("bad", [-1, -0.5, float("nan"), float("inf"), 10**400], ids=lambda _: "")
def test_num_items_that_divide_nothing(bad: Any) -> None:
    for function in (cross_entropy, custom_loss):
        with pytest.raises(ValueError, match=r"num_items is .*expected the number of items"):
            function(num_items=bad)
        if bad != 10**400:
            with pytest.raises(ValueError, match=r"num_items is .*expected the number of items"):
                function(num_items=torch.tensor(bad))


def test_num_items_of_other_kinds() -> None:
    for bad, kind in (
        (True, TypeError), ("3", TypeError), (torch.tensor([1, 2]), RuntimeError),
        (torch.tensor(True), RuntimeError), (torch.tensor(1j), RuntimeError),
        (np.array([1, 2]), RuntimeError), (np.array([]), RuntimeError),
    ):  # fmt: skip
        for function in (cross_entropy, custom_loss):
            with pytest.raises(kind, match="num_items"):
                function(num_items=bad)
