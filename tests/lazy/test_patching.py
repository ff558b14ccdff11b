"""memeff.patch and memeff.unpatch: finding heads, refusing what cannot be lazy, taking it back."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memeff
from memeff.lazy.carriers import Carrier
from memeff.lazy.head import LazyHead, plain_class

V, D = 53, 16


class Model(nn.Module):
    def __init__(self, tied: bool = False, name: str = "lm_head") -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.body = nn.Linear(D, D)
        self.name = name
        head = nn.Linear(D, V, bias=False)
        self.add_module(name, head)
        if tied:
            head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Any:
        return getattr(self, self.name)(torch.tanh(self.body(self.embedding(x))))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x)[:, :-1].reshape(-1, V), x[:, 1:].reshape(-1))


def test_training_is_that_of_the_plain_model() -> None:
    """Tied weights, an optimizer made before, gradient accumulation, save and load."""
    plain = Model(tied=True)
    model = copy.deepcopy(plain)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain)]
    report = memeff.patch(model, strict=True)
    for step in range(6):
        x = torch.randint(V, (3, 9))
        losses = [loss_of(m, x) for m in (model, plain)]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
        for loss in losses:
            loss.backward()
        if step % 2:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert report.without_logits["cross_entropy"] == 6 and not report.materialised
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.load_state_dict(plain.state_dict())
    x = torch.randint(V, (3, 9))
    torch.testing.assert_close(loss_of(model, x), loss_of(plain, x))


def test_unpatch_takes_everything_back() -> None:
    model = Model()
    before = (type(model.lm_head), set(model.__dict__), set(model.lm_head.__dict__))
    memeff.patch(model)
    memeff.unpatch(model)
    assert before == (type(model.lm_head), set(model.__dict__), set(model.lm_head.__dict__))
    assert type(model(torch.tensor([[1]]))) is Tensor
    memeff.unpatch(model)  # nothing to do


def test_a_second_patch_returns_the_same_report() -> None:
    model = Model()
    report = memeff.patch(model)
    assert memeff.patch(model) is report and report.heads == ["lm_head"]
    assert not report.strict
    memeff.patch(model, strict=True)
    with pytest.raises(RuntimeError, match="strict"):
        model(torch.tensor([[1]])).std()


@pytest.mark.parametrize("name", ["lm_head", "output", "classifier"])
def test_finds_the_only_linear_of_the_vocabularys_size(name: str) -> None:
    model = Model(name=name)
    assert memeff.patch(model).heads == [name]
    assert isinstance(model(torch.tensor([[1]])), Carrier)


def test_finds_output_embeddings() -> None:
    model = Model()
    model.other = nn.Linear(D, V)
    model.get_output_embeddings = lambda: model.lm_head
    assert memeff.patch(model).heads == ["lm_head"]


def test_a_linear_is_its_own_head() -> None:
    linear = nn.Linear(D, V)
    assert memeff.patch(linear).heads == ["the model"]
    assert isinstance(linear(torch.randn(2, D)), Carrier)


def test_a_head_that_is_replaced() -> None:
    """resize_token_embeddings makes a new one; it is plain until the model is patched again."""
    model = Model()
    report = memeff.patch(model)
    model.lm_head = nn.Linear(D, V)
    hook = model.lm_head.register_forward_hook(lambda module, args, result: result * 2)
    assert type(model(torch.tensor([[1]]))) is Tensor
    with pytest.warns(UserWarning, match="the hook .* may look at its logits"):
        assert memeff.patch(model) is report
    hook.remove()
    memeff.patch(model)
    assert report.heads == ["lm_head"] and not report.left_dense
    assert isinstance(model(torch.tensor([[1]])), Carrier)


# In a process that has patched nothing yet.
_plain_class_at_first = plain_class(LazyHead)


def test_a_patched_model_is_pickled() -> None:
    model = Model()
    memeff.patch(model)
    x = torch.tensor([[1, 4, 2]])
    loaded = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(loss_of(loaded, x), loss_of(model, x))
    memeff.unpatch(loaded)
    assert type(loaded.lm_head) is nn.Linear and type(model.lm_head) is LazyHead
    assert _plain_class_at_first is nn.Linear


def test_several_heads() -> None:
    model = Model()
    model.second = nn.Linear(D, V)
    with pytest.raises(ValueError, match=r"candidates: lm_head, second.*head="):
        memeff.patch(model)
    assert memeff.patch(model, head=["lm_head", model.second]).heads == ["lm_head", "second"]
    memeff.unpatch(model)
    assert memeff.patch(model, head="second").heads == ["second"]
    assert memeff.patch(model, head="lm_head").heads == ["second", "lm_head"]


def test_heads_that_are_not_found() -> None:
    with pytest.raises(ValueError, match="no candidates"):
        memeff.patch(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with pytest.raises(ValueError, match="'nonsense', expected the name of a submodule"):
        memeff.patch(Model(), head="nonsense")
    with pytest.raises(ValueError, match="empty"):
        memeff.patch(Model(), head=[])
    with pytest.raises(ValueError, match="not part of the model"):
        memeff.patch(Model(), head=nn.Linear(D, V))
    with pytest.raises(TypeError, match="model must be"):
        memeff.patch(lambda x: x)
    with pytest.raises(TypeError, match="model must be"):
        memeff.unpatch(lambda x: x)
    for wrong in (3, [3]):
        with pytest.raises(TypeError, match="a module, a name, or a list of these, got int"):
            memeff.patch(Model(), head=wrong)


class OtherLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class SameLinear(nn.Linear):
    pass


def test_what_cannot_be_lazy_stays_dense() -> None:
    def float8(m: Model) -> None:
        m.lm_head.weight = nn.Parameter(
            m.lm_head.weight.data.to(torch.float8_e4m3fn), requires_grad=False
        )

    def other_class(m: Model) -> None:
        m.lm_head = OtherLinear(D, V)

    def no_linear(m: Model) -> None:
        m.lm_head = nn.Sequential(nn.Linear(D, V), nn.ReLU())

    def quantized(m: Model) -> None:
        m.lm_head = torch.ao.nn.quantized.dynamic.Linear(D, V)

    def forward_replaced(m: Model) -> None:
        m.lm_head.forward = lambda h: F.linear(h, m.lm_head.weight)

    def hooked(m: Model) -> None:
        m.lm_head.register_forward_hook(lambda module, args, output: output * 2)

    def pre_hooked(m: Model) -> None:
        m.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))

    def parametrized(m: Model) -> None:
        nn.utils.parametrizations.weight_norm(m.lm_head)

    for spoil, reason in [
        (float8, "dtype torch.float8_e4m3fn"),
        (other_class, "OtherLinear has a forward of its own"),
        (no_linear, "it is a Sequential"),
        (quantized, "it is a Linear, expected an nn.Linear"),
        (forward_replaced, "forward was replaced"),
        (hooked, "hook .*hooked.* may look at"),
        (pre_hooked, "hook .*pre_hooked.* may look at"),
        (parametrized, "has a forward of its own|parametrized"),
    ]:
        model = Model()
        spoil(model)
        x = torch.randint(V, (2, 3))
        before = None if spoil is float8 else model(x)
        with pytest.warns(UserWarning, match=reason):
            report = memeff.patch(model, head="lm_head")
        assert report.heads == [] and "lm_head" in report.left_dense, spoil
        assert before is None or torch.equal(model(x), before)
        with pytest.raises(RuntimeError, match="cannot be lazy"):
            memeff.patch(model, head="lm_head", strict=True)
        memeff.unpatch(model)


def test_a_subclass_with_the_forward_of_linear() -> None:
    model = Model()
    model.lm_head = SameLinear(D, V)
    memeff.patch(model)
    assert isinstance(model.lm_head, SameLinear) and isinstance(model.lm_head, LazyHead)
    assert isinstance(model(torch.tensor([[1]])), Carrier)
    memeff.unpatch(model)
    assert type(model.lm_head) is SameLinear


def test_a_hook_added_later_gets_plain_logits() -> None:
    model = Model()
    plain = copy.deepcopy(model)
    report = memeff.patch(model)
    x = torch.randint(V, (2, 3))
    seen: list[Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda m, a, output: seen.append(output))
    with pytest.warns(UserWarning, match="may look at its logits"):
        z = model(x)
    assert type(z) is Tensor and seen[0] is z and torch.equal(z, plain(x))
    assert "may look" in report.left_dense["lm_head"]
    handle.remove()
    assert isinstance(model(x), Carrier)


@pytest.mark.parametrize("spoil", ["dtype", "shape", "type"])
def test_wrong_inputs_have_torchs_errors(spoil: str) -> None:
    head = nn.Linear(D, V)
    memeff.patch(head)
    inputs: dict[str, Any] = {
        "dtype": torch.randn(2, D, dtype=torch.float64),
        "shape": torch.randn(2, D + 1),
        "type": [1.0] * D,
    }
    with pytest.raises((RuntimeError, TypeError)) as ours:
        head(inputs[spoil])
    with pytest.raises((RuntimeError, TypeError)) as plain:
        nn.Linear(D, V)(inputs[spoil])
    assert type(ours.value) is type(plain.value) and str(ours.value) == str(plain.value)


def test_meta_device_and_export_and_trace_are_dense() -> None:
    head = nn.Linear(D, V, device="meta")
    with pytest.warns(UserWarning, match="no kernels for meta"):
        memeff.patch(head)
        assert type(head(torch.randn(2, D, device="meta"))) is Tensor
    model = Model()
    plain = copy.deepcopy(model)
    memeff.patch(model)
    x = torch.randint(V, (2, 3))
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), plain(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model, (x,))
    torch.testing.assert_close(traced(x), plain(x))


def test_deepcopy_and_save_of_a_patched_model(tmp_path: Any) -> None:
    model = Model()
    memeff.patch(model)
    x = torch.randint(V, (2, 3))
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (twin, loaded):
        torch.testing.assert_close(loss_of(other, x), loss_of(model, x))
        assert isinstance(other(x), Carrier)
        memeff.unpatch(other)
        assert type(other(x)) is Tensor
    assert isinstance(model(x), Carrier)


def test_wrapped_models() -> None:
    inner = Model()
    compiled = torch.compile(inner, backend="eager")
    report = memeff.patch(compiled)
    assert memeff.patch(inner) is report and report.heads == ["lm_head"]
    memeff.unpatch(compiled)
    assert type(inner.lm_head) is nn.Linear


def test_import_of_memeff_imports_no_torch() -> None:
    code = (
        "import sys, memeff; assert 'torch' not in sys.modules; memeff.patch; "
        "assert 'transformers' not in sys.modules and 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
