"""PEFT's adapters on the body and on the head, and copies of a head: as plain, without logits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from families import GRADIENT_TOLERANCE, gradient_error, make_batch, make_model

import memeff

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
ON_HEAD = {"target_modules": ["q_proj", "lm_head"]}


def config(**options: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "init_lora_weights": False}
    return peft.LoraConfig(**{**settings, **options})


def lora(model_type: str = "llama", **options: Any) -> Any:
    model = make_model("causal", model_type)
    torch.manual_seed(11)
    return peft.get_peft_model(model, config(**options)).eval()


def check_equal(model: Any, plain: Any) -> None:
    """Loss and gradients of a step, and predictions."""
    batch = make_batch("causal", plain)
    losses = []
    for m in (model, plain):
        m.zero_grad()
        loss = m(**batch).loss
        if loss.requires_grad:  # not if all adapters are merged or disabled
            loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    if any(p.grad is not None for p in plain.parameters()):
        assert gradient_error(model, plain) <= GRADIENT_TOLERANCE
    with torch.no_grad():
        predictions = [m(**batch).logits.argmax(-1) for m in (model, plain)]
    assert torch.equal(*predictions)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        ON_HEAD,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head"], "use_rslora": True},
    ],
    ids=["body", "head", "modules_to_save", "rslora"],
)
def test_adapter(options: dict[str, Any]) -> None:
    """LoRA on the head is one head [W, s B] over [x; A x]."""
    plain = lora(**options)
    model = copy.deepcopy(plain)
    report = memeff.patch(model, strict=True)
    check_equal(model, plain)
    assert report.without_logits["cross_entropy"] and not report.materialised
    merged, expected = model.merge_and_unload(), plain.merge_and_unload()
    check_equal(merged, expected)
    memeff.unpatch(merged)
    assert not any("Lazy" in type(m).__name__ for m in merged.modules())


def test_dora_computes_the_logits() -> None:
    """The norm of W + s B A per class scales the logits: with one warning, and right."""
    plain = lora(target_modules=["lm_head"], use_dora=True)
    model = copy.deepcopy(plain)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = memeff.patch(model)
        for _ in range(2):
            check_equal(model, plain)
    ours = [w for w in caught if "memeff" in str(w.message)]
    assert len(ours) == 1, [str(w.message) for w in ours]
    assert report.materialised or report.left_dense


def test_patched_before_the_adapters() -> None:
    """get_peft_model wraps a head that is lazy already; a second patch adds the adapter's."""
    plain = make_model("causal", "llama")
    model = copy.deepcopy(plain)
    memeff.patch(model)
    models = []
    for base in (model, plain):
        torch.manual_seed(11)
        models.append(peft.get_peft_model(base, config(**ON_HEAD)).eval())
    report = memeff.patch(models[0], strict=True)
    check_equal(*models)
    assert report.without_logits["cross_entropy"] and not report.materialised


def with_adapters(*names: str) -> tuple[Any, Any, Any]:
    """A model with adapters of different ranks on its head, patched, and a plain one."""
    plain = lora(**ON_HEAD)
    for rank, name in enumerate(names, start=2):
        plain.add_adapter(name, config(r=rank, **ON_HEAD))
    plain.eval()
    model = copy.deepcopy(plain)
    return model, plain, memeff.patch(model, strict=True)


@pytest.mark.parametrize(
    "act",
    [
        lambda m: m.set_adapter("second"),
        lambda m: m.base_model.set_adapter(["default", "second"]),
        lambda m: m.base_model.set_adapter(["second", "third", "default"]),
        lambda m: m.merge_adapter(["second"]),
        lambda m: (m.merge_adapter(), m.unmerge_adapter()),
        lambda m: m.delete_adapter("second"),
        lambda m: m.add_weighted_adapter(["default", "second"], [0.3, 0.7], "sum", "cat"),
        lambda m: m.base_model.disable_adapter_layers(),
    ],
    ids=["second", "two", "three", "merge", "unmerge", "delete", "weighted", "disabled"],
)
def test_several_adapters(act: Callable[[Any], Any]) -> None:
    model, plain, report = with_adapters("second", "third")
    for m in (model, plain):
        act(m)
    check_equal(model, plain)
    assert report.without_logits["cross_entropy"] and not report.materialised


def test_disable_adapter() -> None:
    """As a reference model in preference training, inside and outside of the context."""
    model, plain, report = with_adapters()
    batch = make_batch("causal", plain)
    for m in (model, plain):
        with m.disable_adapter():
            m.reference = m(**batch).loss.detach()
        m.trained = m(**batch).loss.detach()
    assert model.reference != model.trained
    torch.testing.assert_close(model.reference, plain.reference, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.trained, plain.trained, rtol=1e-6, atol=1e-6)
    assert not report.materialised


def test_adapter_added_after_the_patch_is_lazy_after_another() -> None:
    model, plain, _ = with_adapters()
    for m in (model, plain):
        torch.manual_seed(3)
        m.add_adapter("late", config(r=3, **ON_HEAD))
        m.set_adapter("late")
        m.eval()
    report = memeff.patch(model, strict=True)
    check_equal(model, plain)
    assert not report.materialised


def test_dropout_of_the_adapter_on_the_head() -> None:
    plain = lora(target_modules=["lm_head"], lora_dropout=0.5)
    model = copy.deepcopy(plain)
    memeff.patch(model, strict=True)
    batch = make_batch("causal", plain)
    losses = []
    for m in (model, plain):
        m.train()
        torch.manual_seed(5)
        losses.append(m(**batch).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    assert gradient_error(model, plain) <= GRADIENT_TOLERANCE


def test_save_and_load_an_adapter(tmp_path: Any) -> None:
    model, plain, _ = with_adapters()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model("causal", "llama"), tmp_path).eval()
    batch = make_batch("causal", plain)
    torch.testing.assert_close(loaded(**batch).loss, plain(**batch).loss)
