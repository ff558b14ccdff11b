"""memeff.LinearCrossEntropyLoss: owning or sharing its classifier."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import memeff

needs_torch_module = pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyLoss"),
    reason=f"torch {torch.__version__} has no LinearCrossEntropyLoss (2.13 and later have)",
)


@needs_torch_module
@pytest.mark.parametrize("out_features", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_like_torch(out_features: tuple[int, ...], bias: bool) -> None:
    """Same parameters for the same seed, same state dict, same loss and gradients."""
    keywords = {
        "out_features": out_features, "bias": bias, "reduction": "sum", "ignore_index": 1,
        "weight": torch.rand(7), "label_smoothing": 0.1,
    }  # fmt: skip
    torch.manual_seed(5)
    theirs = nn.LinearCrossEntropyLoss(4, 7, **keywords)
    torch.manual_seed(5)
    ours = memeff.LinearCrossEntropyLoss(4, 7, **keywords)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())

    x, target = torch.randn(5, 4), torch.randint(7, (5, *out_features))
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        loss = module(leaf, target)
        loss.backward()
        results.append([loss, leaf.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("by", ["linear", "linear_weight"])
def test_shares_a_tied_embedding(by: str) -> None:
    embedding = nn.Embedding(13, 6)
    shared = {by: embedding if by == "linear" else embedding.weight}
    loss = memeff.LinearCrossEntropyLoss(**shared, shift=True)
    assert loss.linear_weight is embedding.weight and loss.linear_bias is None
    assert loss.num_classes == 13 and "in_features=6" in repr(loss)
    tokens = torch.randint(13, (2, 5))
    loss(embedding(tokens), tokens).backward()
    gradient = embedding.weight.grad
    assert gradient is not None

    leaf = embedding.weight.detach().clone().requires_grad_()
    hidden = nn.functional.embedding(tokens, leaf)
    memeff.reference.linear_cross_entropy(hidden, leaf, tokens, shift=1).backward()
    torch.testing.assert_close(gradient, leaf.grad)


def test_shares_a_linear() -> None:
    head = nn.Linear(6, 13)
    loss = memeff.LinearCrossEntropyLoss(6, 13, linear=head)
    assert loss.linear is head
    x, target = torch.randn(3, 6), torch.randint(13, (3,))
    expected = nn.functional.cross_entropy(head(x), target)
    torch.testing.assert_close(loss(x, target), expected)
    assert torch.equal(
        memeff.LinearCrossEntropyLoss(linear_weight=head.weight, linear_bias=head.bias)(x, target),
        loss(x, target),
    )
    before = head.weight.clone()
    loss.reset_parameters()
    assert not torch.equal(before, head.weight)


class Model(nn.Module):
    """A head, and a loss that shares it in one of two ways."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.head = nn.Linear(6, 13)
        if by == "linear":
            self.loss = memeff.LinearCrossEntropyLoss(linear=self.head)
        else:
            self.loss = memeff.LinearCrossEntropyLoss(
                linear_weight=self.head.weight, linear_bias=self.head.bias
            )


@pytest.mark.parametrize("by", ["linear", "linear_weight"])
def test_sharing_adds_nothing_to_the_model(by: str) -> None:
    model = Model(by)
    names = ["head.weight", "head.bias"]
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == names
    assert not list(model.loss.parameters()) and not model.loss.state_dict()


@pytest.mark.parametrize("by", ["linear", "linear_weight"])
def test_sharing_survives_copies_moves_and_loading(by: str) -> None:
    model = Model(by)
    twin = copy.deepcopy(model)
    assert twin.loss.linear_weight is twin.head.weight is not model.head.weight
    twin.double().load_state_dict(Model(by).state_dict())
    assert twin.loss.linear_weight is twin.head.weight
    assert twin.loss.linear_bias is twin.head.bias and twin.head.bias.dtype == torch.float64
    x, target = torch.randn(5, 6, dtype=torch.float64), torch.randint(13, (5,))
    expected = nn.functional.cross_entropy(twin.head(x), target)
    torch.testing.assert_close(twin.loss(x, target), expected)


def test_shared_weight_may_be_replaced() -> None:
    """As to_empty does with a model that was made on the meta device."""
    with torch.device("meta"):
        model = Model("linear")
    model.to_empty(device="cpu").load_state_dict(Model("linear").state_dict())
    loss = model.loss(torch.randn(5, 6), torch.randint(13, (5,)))
    loss.backward()
    assert loss.isfinite() and model.head.weight.grad is not None


def test_forward_arguments_and_statistics() -> None:
    module = memeff.LinearCrossEntropyLoss(
        6, 13, bias=True, softcap=3.0, z_loss=0.1, dtype=torch.float64
    )
    x, target = torch.randn(2, 4, 6, dtype=torch.float64), torch.randint(13, (2, 4))
    token_weight = torch.rand(2, 4)
    loss, statistics = module(
        x, target, token_weight=token_weight, num_items=5, return_statistics=True
    )
    expected = memeff.reference.linear_cross_entropy(
        x, module.linear.weight, target, linear_bias=module.linear.bias, softcap=3.0, z_loss=0.1,
        token_weight=token_weight, num_items=5,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    assert statistics.lse.shape == (2, 4)


def test_settings_are_attributes() -> None:
    module = memeff.LinearCrossEntropyLoss(6, 13)
    module.reduction = "none"
    assert module(torch.randn(3, 6), torch.randint(13, (3,))).shape == (3,)


def vocab_parallel() -> memeff.VocabParallel:
    """As if there were a process group."""
    shared = object.__new__(memeff.VocabParallel)
    object.__setattr__(shared, "group_name", "ranks")
    return shared


SETTINGS: dict[str, Any] = {  # none of them the default
    "reduction": "sum", "ignore_index": 3, "label_smoothing": 0.2, "softcap": 3.0,
    "options": SimpleNamespace(batch_chunk_size=None),
    "logit_scale": 0.7, "z_loss": 0.1, "shift": 1, "memory_budget": "1GiB", "chunk_size": 64,
    "accum_dtype": torch.float32, "skip_mass": 1e-4, "backend": "reference",
    "vocab_parallel": vocab_parallel(),
}  # fmt: skip


def test_every_setting_reaches_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given to the constructor, which has the function's defaults, or set later on."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        memeff.modules, "linear_cross_entropy", lambda *args, **options: seen.update(options)
    )
    parameters = inspect.signature(memeff.linear_cross_entropy).parameters
    of_a_call = {
        "input", "linear_weight", "target", "linear_bias", "weight", "token_weight", "num_items",
        "return_statistics",
    }  # fmt: skip
    assert parameters.keys() - of_a_call == SETTINGS.keys()
    constructor = inspect.signature(memeff.LinearCrossEntropyLoss).parameters
    constructed = memeff.LinearCrossEntropyLoss(6, 13, **SETTINGS)
    changed = memeff.LinearCrossEntropyLoss(6, 13)
    for name, value in SETTINGS.items():
        assert constructor[name].default == parameters[name].default != value, name
        setattr(changed, name, value)
    for module in (constructed, changed):
        seen.clear()
        module(torch.randn(3, 6), torch.randint(13, (3,)))
        assert {name: seen[name] for name in SETTINGS} == SETTINGS


def test_repr() -> None:
    plain = memeff.LinearCrossEntropyLoss(6, 13)
    assert plain.extra_repr() == "in_features=6, num_classes=13, bias=False, reduction='mean'"
    full = memeff.LinearCrossEntropyLoss(
        6, 13, bias=True, reduction="sum", weight=torch.ones(13), softcap=30.0, memory_budget="1GB"
    )
    text = repr(full)
    for part in (
        "bias=True",
        "reduction='sum'",
        "weight=(13,)",
        "softcap=30.0",
        "memory_budget='1GB'",
    ):
        assert part in text


def test_copies_and_moves() -> None:
    module = memeff.LinearCrossEntropyLoss(6, 13, weight=torch.ones(13))
    twin = copy.deepcopy(module).double()
    assert twin.linear.weight.dtype == twin.weight.dtype == torch.float64
    assert twin.linear.weight is not module.linear.weight


@pytest.mark.parametrize(
    ("keywords", "kind", "text"),
    [
        ({}, TypeError, "in_features is None"),
        ({"in_features": 6}, TypeError, "num_classes is None"),
        ({"linear": torch.ones(3, 4)}, TypeError, "linear must be"),
        ({"linear": nn.Parameter(torch.ones(3, 4))}, TypeError, "goes by linear_weight"),
        ({"linear": nn.Conv1d(3, 4, 1)}, TypeError, "got Conv1d"),
        ({"linear_weight": torch.ones(3)}, RuntimeError, "linear_weight has shape"),
        ({"linear_weight": nn.Linear(6, 13)}, TypeError, "linear_weight must be a torch.Tensor"),
        (
            {"linear_weight": torch.ones(3, 4), "linear_bias": torch.ones(4)}, RuntimeError,
            "linear_bias has shape",
        ),
        ({"linear_bias": torch.ones(4)}, ValueError, "without linear_weight"),
        ({"linear_weight": torch.ones(3, 4), "bias": True}, ValueError, "with linear_weight"),
        (
            {"linear": nn.Linear(6, 13), "linear_weight": torch.ones(3, 4)}, ValueError,
            "only one of them",
        ),
        ({"linear": nn.Linear(6, 13), "bias": True}, ValueError, "bias is True"),
        ({"linear": nn.Linear(6, 13), "in_features": 5}, ValueError, "in_features is 5"),
        ({"linear": nn.Linear(6, 13), "num_classes": 12}, ValueError, "num_classes is 12"),
        ({"linear": nn.Linear(6, 13), "out_features": (2,)}, ValueError, "13 rows"),
        (
            {"in_features": 6, "num_classes": 13, "weight": torch.ones(12)}, RuntimeError,
            "weight has shape",
        ),
        (
            {"in_features": 6, "num_classes": 13, "label_smoothing": 2.0}, ValueError,
            "label_smoothing is 2",
        ),
        (
            {"in_features": 6, "num_classes": 13, "reduction": "max"}, ValueError,
            "reduction is 'max'",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_bad_construction(keywords: dict[str, object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        memeff.LinearCrossEntropyLoss(**keywords)


def test_import_is_light() -> None:
    """`import memeff` does not load torch; names load on first use; the package lists them."""
    code = (
        "import sys, memeff\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "assert dir(memeff) == sorted([*memeff.__all__, '__version__'])\n"
        "from importlib.metadata import version\n"
        "assert memeff.__version__ == version('memeff') and 'torch' not in sys.modules\n"
        "assert all(getattr(memeff, name) is not None for name in memeff.__all__)\n"
        "import memeff.planning, memeff.reference, memeff.statistics\n"
        "assert callable(memeff.plan) and callable(memeff.reference.linear_cross_entropy)\n"
        "assert not hasattr(memeff, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
