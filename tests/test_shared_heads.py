"""LinearCrossEntropyLoss(linear=head) computes what the head computes, or refuses the head."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import memeff

D, V = 6, 13


def loss_and_gradients(compute: Any, head: nn.Module, x: Tensor) -> list[Tensor | None]:
    head.zero_grad()
    leaf = x.clone().requires_grad_()
    loss = compute(leaf)
    (loss * 1.7).backward()
    return [loss.detach(), leaf.grad, *(p.grad for p in head.parameters())]


def assert_like_head(loss: nn.Module, head: nn.Module, lead: tuple[int, ...] = (9,)) -> None:
    """Loss and all gradients, those of adapters included, are those of the head's logits."""
    dtype = next(head.parameters()).dtype
    x, target = torch.randn(*lead, D, dtype=dtype), torch.randint(V, lead)

    def plain(x: Tensor) -> Tensor:
        return F.cross_entropy(head(x).reshape(-1, V), target.reshape(-1))

    torch.manual_seed(3)  # dropout
    ours = loss_and_gradients(lambda x: loss(x, target), head, x)
    torch.manual_seed(3)
    theirs = loss_and_gradients(plain, head, x)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Normalised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, F.normalize(self.weight), self.bias)


class Cast(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype)).float()


class OwnLora(nn.Linear):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lora_A, self.lora_B = nn.Linear(D, 2), nn.Linear(2, V)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 2 * self.lora_B(self.lora_A(input))


class OtherCall(nn.Linear):
    def __call__(self, input: Tensor) -> Tensor:
        return 2 * super().__call__(input)


class OnlyAName(nn.Linear):
    """A subclass with the forward of nn.Linear."""


def hooked(how: str) -> nn.Linear:
    head = nn.Linear(D, V)
    getattr(head, how)(lambda module, *_: None)
    return head


def replaced() -> nn.Linear:
    head = nn.Linear(D, V)
    head.forward = lambda x: 2 * nn.Linear.forward(head, x)  # type: ignore[method-assign]
    return head


def pruned(module: nn.Module) -> nn.Module:
    from torch.nn.utils import prune

    return prune.l1_unstructured(module, "weight", amount=0.3)  # type: ignore[no-any-return]


# Modules that compute something else, by name.
REFUSED = {
    "normalised": functools.partial(Normalised, D, V),
    "cast": functools.partial(Cast, D, V),
    "lora of their own": functools.partial(OwnLora, D, V),
    "__call__": functools.partial(OtherCall, D, V),
    "forward replaced": replaced,
    "forward hook": functools.partial(hooked, "register_forward_hook"),
    "forward pre-hook": functools.partial(hooked, "register_forward_pre_hook"),
    "backward hook": functools.partial(hooked, "register_full_backward_hook"),
    "backward pre-hook": functools.partial(hooked, "register_full_backward_pre_hook"),
    "weight_norm": lambda: nn.utils.weight_norm(nn.Linear(D, V)),
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(D, V)),
    "pruned": lambda: pruned(nn.Linear(D, V)),
    "weight_norm of an embedding": lambda: nn.utils.weight_norm(nn.Embedding(V, D)),
    "pruned embedding": lambda: pruned(nn.Embedding(V, D)),
    "sequential": lambda: nn.Sequential(nn.Linear(D, V)),
    "bilinear": lambda: nn.Bilinear(D, D, V),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_is_more_than_a_weight(name: str) -> None:
    """At construction, and at call time where the head became that later."""
    head = REFUSED[name]()
    with pytest.raises((TypeError, ValueError), match=r"^linear (is|has|must be) .*expected|got"):
        memeff.LinearCrossEntropyLoss(linear=head)
    loss = memeff.LinearCrossEntropyLoss(D, V)
    loss.linear = head
    with pytest.raises((TypeError, ValueError), match=r"^linear (is|has|must be)"):
        loss(torch.randn(3, D), torch.randint(V, (3,)))


def test_hooks_that_come_later_are_seen() -> None:
    head = nn.Linear(D, V).double()
    loss = memeff.LinearCrossEntropyLoss(linear=head)
    assert_like_head(loss, head)
    handle = head.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match=r"linear has the hook .*lambda.*expected no hooks"):
        assert_like_head(loss, head)
    handle.remove()
    assert_like_head(loss, head)


@pytest.mark.parametrize("how", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("embedding", [False, True])
def test_hooks_of_all_modules_are_seen(how: str, embedding: bool) -> None:
    """They would have changed what the head computes, too."""
    linear = nn.Embedding(V, D).double() if embedding else nn.Linear(D, V).double()
    loss = memeff.LinearCrossEntropyLoss(linear=linear)
    x, target = torch.randn(3, D).double(), torch.randint(V, (3,))
    before = loss(x, target)
    register = getattr(nn.modules.module, f"register_module_{how}_hook")
    handle = register(lambda module, *_: None)
    try:
        with pytest.raises(ValueError, match=r"^linear has the hook .*lambda.* of all modules"):
            loss(x, target)
    finally:
        handle.remove()
    assert torch.equal(loss(x, target), before)


def test_hooks_of_torchs_counters_are_none_of_those() -> None:
    """FlopCounterMode registers hooks of all modules, which only look."""
    from torch.utils.flop_counter import FlopCounterMode

    loss = memeff.LinearCrossEntropyLoss(linear=nn.Linear(D, V))
    with FlopCounterMode(display=False) as counter:
        loss(torch.randn(3, D), torch.randint(V, (3,)))
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations_stay_right(norm: str) -> None:
    head = getattr(parametrizations, norm)(nn.Linear(D, V).double()).eval()
    assert_like_head(memeff.LinearCrossEntropyLoss(linear=head), head)


def test_subclass_with_the_same_forward() -> None:
    head = OnlyAName(D, V).double()
    assert_like_head(memeff.LinearCrossEntropyLoss(linear=head), head)


def test_hooks_of_an_embedding_do_not_concern_the_head() -> None:
    """transformers' enable_input_require_grads registers one."""
    embedding = nn.Embedding(V, D)
    embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    memeff.LinearCrossEntropyLoss(linear=embedding)(torch.randn(3, D), torch.randint(V, (3,)))


def with_lora(head: nn.Module, adapters: int = 1, **options: Any) -> Any:
    """The head with active adapters of different ranks and scales, none of them zero."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(11)
    model = nn.ModuleDict({"head": head})
    names = [f"adapter{i}" for i in range(adapters)]
    for i, name in enumerate(names):
        config = peft.LoraConfig(
            r=2 + i, lora_alpha=3, target_modules=["head"], init_lora_weights=False, **options
        )
        peft.inject_adapter_in_model(config, model, name)
    wrapped = model["head"]
    wrapped.set_adapter(names)
    return wrapped


@pytest.mark.parametrize("lead", [(9,), (2, 5), ()], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"lora_dropout": 0.4}, {"use_rslora": True}, {"lora_bias": True}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_lora(options: dict[str, Any], bias: bool, lead: tuple[int, ...]) -> None:
    if options.get("lora_bias") and not bias:
        options = {}  # PEFT wants a bias to add to
    head = with_lora(nn.Linear(D, V, bias=bias), **options).double()
    assert_like_head(memeff.LinearCrossEntropyLoss(linear=head), head, lead)


def test_lora_adapters_come_and_go() -> None:
    """Two at a time, one, none, merged ones, and the copy of a layer that is trained whole."""
    head = with_lora(nn.Linear(D, V), adapters=2).double()
    loss = memeff.LinearCrossEntropyLoss(linear=head)
    assert loss.num_classes == V and "in_features=6" in repr(loss)
    assert_like_head(loss, head)
    head.set_adapter("adapter1")
    assert_like_head(loss, head)
    head.enable_adapters(False)
    assert_like_head(loss, head)
    head.enable_adapters(True)
    head.merge()
    assert_like_head(loss, head)
    head.enable_adapters(False)
    twin = copy.deepcopy(head)
    assert_like_head(memeff.LinearCrossEntropyLoss(linear=twin), head)
    owner = memeff.LinearCrossEntropyLoss(D, V)  # PEFT replaced the layer of an owner
    owner.linear = with_lora(nn.Linear(D, V)).double()
    assert_like_head(owner, owner.linear)


def test_lora_trained_as_a_whole() -> None:
    peft = pytest.importorskip("peft")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(D, D), nn.Linear(D, V)

    config = peft.LoraConfig(target_modules=["body"], modules_to_save=["head"])
    model = peft.get_peft_model(Model().double(), config)
    head = model.base_model.model.head
    with torch.no_grad():
        head.modules_to_save["default"].weight.mul_(2)
    loss = memeff.LinearCrossEntropyLoss(linear=head)
    assert_like_head(loss, head)
    with model.disable_adapter():
        assert_like_head(loss, head)


def test_lora_with_a_variant_is_refused() -> None:
    head = with_lora(nn.Linear(D, V), use_dora=True)
    with pytest.raises(TypeError, match=r"linear has the adapter 'adapter0' of the kind Dora"):
        memeff.LinearCrossEntropyLoss(linear=head)


@pytest.mark.parametrize("inner", ["base_layer", "lora_B"])
def test_lora_whose_parts_are_more_than_weights_is_refused(inner: str) -> None:
    head = with_lora(nn.Linear(D, V))
    part = head.base_layer if inner == "base_layer" else head.lora_B["adapter0"]
    loss = memeff.LinearCrossEntropyLoss(linear=head)
    part.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match=rf"linear\.{inner}.* has the hook"):
        loss(torch.randn(3, D), torch.randint(V, (3,)))


def test_lora_in_bfloat16_keeps_what_merging_would_round() -> None:
    """A 16-bit weight with a small float32 adapter: far closer than W + B A rounded to bfloat16."""
    head = with_lora(nn.Linear(64, 300, bias=False).bfloat16())
    adapter = head.lora_A["adapter0"].float(), head.lora_B["adapter0"].float()
    with torch.no_grad():
        adapter[1].weight.mul_(1e-3)
    x, target = torch.randn(50, 64).bfloat16(), torch.randint(300, (50,))
    ours = memeff.LinearCrossEntropyLoss(linear=head, reduction="none")(x, target)
    delta = adapter[1].weight.double() @ adapter[0].weight.double() * head.scaling["adapter0"]
    weight = head.base_layer.weight.double()

    def reference(weight: Tensor) -> Tensor:
        return F.cross_entropy(x.double() @ weight.t(), target, reduction="none")

    exact = reference(weight + delta)
    merged = reference((weight + delta).bfloat16().double())
    assert (ours - exact).norm() <= 0.1 * (merged - exact).norm()


def test_patched_heads_are_heads() -> None:
    model = nn.Sequential(nn.Linear(D, V)).double()
    memeff.patch(model, head="0")
    x, target = torch.randn(5, D).double(), torch.randint(V, (5,))
    expected = F.cross_entropy(F.linear(x, model[0].weight, model[0].bias), target)
    loss = memeff.LinearCrossEntropyLoss(linear=model[0])
    torch.testing.assert_close(loss(x, target), expected)


def test_compiles() -> None:
    head = with_lora(nn.Linear(D, V))
    loss = memeff.LinearCrossEntropyLoss(linear=nn.Linear(D, V))
    x, target = torch.randn(5, D), torch.randint(V, (5,))
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, target), loss(x, target))
    lora = memeff.LinearCrossEntropyLoss(linear=head)
    compiled = torch.compile(lora, backend="aot_eager")
    torch.testing.assert_close(compiled(x, target), lora(x, target))
