"""The objects in place of logits: what they are in Python, aliasing and in-place writes, gradient
modes, autocast, and what keeps them from being wrong when something changes under them."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lazy_cases import FEATURES, VOCAB, Comparison
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

import memeff
from memeff.lazy.carriers import LazyObject, LazyOutput, LazyTensor

V = VOCAB
pytestmark = pytest.mark.filterwarnings("ignore:.*computed the logits")


def both(c: Comparison) -> tuple[Any, Tensor]:
    return c.lazy.head(c.lazy.hidden), c.plain.head(c.plain.hidden)


def test_kinds() -> None:
    c = Comparison()
    assert isinstance(c.lazy.head(c.lazy.hidden), LazyObject)
    with torch.no_grad():
        z = c.lazy.head(c.lazy.hidden)
    assert isinstance(z, LazyTensor) and isinstance(z, Tensor) and torch.is_tensor(z)
    assert isinstance(z[0].float(), Tensor)
    assert isinstance(c.lazy.head(c.lazy.hidden).detach(), Tensor)
    with torch.inference_mode():
        assert isinstance(c.lazy.head(c.lazy.hidden), Tensor)


def test_python_protocols() -> None:
    c = Comparison(strict=False)
    z, plain = both(c)
    assert "logits of (3, 5, 67), torch.float32" in repr(z) and "not computed" in str(z)
    assert not z.node.is_dense, "repr computed the logits"
    assert len(z) == 3 and [tuple(row.shape) for row in z] == [(5, V)] * 3
    assert all(isinstance(row, LazyObject) for row in z)
    assert {z: 1}[z] == 1
    assert not z.node.is_dense
    assert (z == plain).all() and (z - plain).abs().max() == 0
    assert z.tolist() == plain.tolist()
    assert float(z[0, 0, 0]) == float(plain[0, 0, 0]) and f"{z[0, 0, 0]:.4f}"
    with pytest.raises(RuntimeError, match="requires grad"):
        z.numpy()
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(z)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(z)
    assert "computed" in repr(z) and "not computed" not in repr(z)


class DoubledGradient(torch.autograd.Function):
    """As the functions that wrappers put around the tensors of an output."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def test_what_wrappers_of_models_look_into() -> None:
    """DDP, FSDP and Lightning walk through dataclasses and pytrees; test_stacks.py runs the first
    two."""
    c = Comparison()
    # As in a process group. One head, twice, as LoRA adds two of them.
    z = c.lazy.head(c.lazy.hidden)
    z = LazyOutput(((z + c.lazy.head(2 * c.lazy.hidden))[:, 1:] * 3.0).node)
    assert dataclasses.is_dataclass(z) and len(z.tensors) == 3
    assert all(t.requires_grad for t in z.tensors)

    leaves, spec = tree_flatten({"logits": z})
    assert [tuple(leaf.shape) for leaf in leaves] == [(3, 5, FEATURES)] * 2
    again = tree_unflatten([DoubledGradient.apply(leaf) for leaf in leaves], spec)["logits"]
    assert not again.node.is_dense and again.shape == z.shape
    y = torch.randint(V, (3, 4))
    plain = 9 * F.linear(c.plain.hidden, c.plain.head.weight)[:, 1:]
    ours, expected = (F.cross_entropy(t.flatten(0, 1), y.flatten()) for t in (again, plain))
    torch.testing.assert_close(ours, expected)
    ours.backward()
    (2 * expected).backward()
    torch.testing.assert_close(c.lazy.hidden.grad, c.plain.hidden.grad)

    for halved in (
        dataclasses.replace(z, tensors=[t.bfloat16() for t in z.tensors]),
        tree_map(torch.Tensor.bfloat16, z),
    ):
        assert halved.dtype == torch.bfloat16 and halved.requires_grad
    assert not tree_map(torch.Tensor.detach, z).requires_grad
    assert tree_map(torch.clone, z).shape == z.shape
    assert tree_map(lambda t: None, z) is None
    for function in (lambda t: 2 * t, lambda t: t[1:], lambda t: t.shape):
        with pytest.raises(RuntimeError, match=r"map it over logits\.dense\(\)"):
            tree_map(function, z)
        with pytest.raises(RuntimeError, match=r"map it over logits\.dense\(\)"):
            dataclasses.replace(z, tensors=[function(t) for t in z.tensors[:2]])
    copied = copy.deepcopy(z)
    copied.tensors = [t.detach() for t in copied.tensors]
    assert not copied.requires_grad and z.requires_grad and copied.dtype == torch.float32
    frozen = LazyOutput(c.lazy.head(c.lazy.hidden.detach()).node)  # a body that is not trained
    assert dataclasses.replace(frozen, tensors=frozen.tensors).requires_grad


def test_python_protocols_without_gradients() -> None:
    c = Comparison(strict=False)
    with torch.no_grad():
        z, plain = both(c)
    assert torch.equal(copy.deepcopy(z), plain) and type(copy.deepcopy(z)) is Tensor
    assert torch.equal(pickle.loads(pickle.dumps(z)), plain)
    assert (z.numpy() == plain.numpy()).all() and (torch.cat([z, z])[3:] == plain).all()
    assert torch.equal(torch.utils.data.default_collate([z, z])[1], plain)
    out = torch.empty(3, 5, V)
    torch.mul(z, 2.0, out=out)
    assert torch.equal(out, plain * 2)
    out.copy_(z)
    assert torch.equal(out, plain)
    out[:] = z + 1.0
    assert torch.equal(out, plain + 1.0)


@pytest.mark.parametrize(
    "write",
    [
        lambda z: z.__setitem__((..., slice(0, 5)), -torch.inf),
        lambda z: z.masked_fill_(torch.arange(V) < 9, -7.0),
        lambda z: z.add_(1.0),
        lambda z: z.__iadd__(1.0),
        lambda z: z[1].zero_(),
        lambda z: z[:, 2:4].mul_(0.5),
        lambda z: z.transpose(1, 2)[:, 3].fill_(2.0),
        lambda z: F.relu(z, inplace=True),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("before", ["lazy", "computed"])
def test_writes_are_seen_or_an_error(write: Any, grad: bool, before: str) -> None:
    """In-place code on logits, through views as well: what plain logits give, or RuntimeError."""
    c = Comparison(strict=False)
    with torch.set_grad_enabled(grad):
        z, plain = both(c)
        if before == "computed":
            z.dense()
    try:
        write(plain)
    except RuntimeError:  # autograd refuses
        with pytest.raises(RuntimeError):
            write(z)
        return
    write(z)
    try:
        lse, rest = z.logsumexp(-1), z[0].float() * 1
    except RuntimeError as error:
        assert "modified in place" in str(error) and before == "lazy"
        return
    torch.testing.assert_close(lse, plain.logsumexp(-1))
    torch.testing.assert_close(
        torch.as_tensor(rest.dense() if hasattr(rest, "dense") else rest), plain[0]
    )


def test_temperature_in_place_stays_lazy() -> None:
    c = Comparison(strict=True)

    def loss(z: Any) -> Tensor:
        z = z[:, :-1]
        z /= 0.7
        return F.cross_entropy(z.reshape(-1, V), torch.arange(12))

    c.check(loss)


@pytest.mark.parametrize("write", [lambda z: z.div_(4.0), lambda z: z.neg_()])
def test_writes_that_autograd_does_not_record(write: Any) -> None:
    """Their factor is in the value, and not in the gradient."""

    def loss(z: Any) -> Tensor:
        with torch.no_grad():
            write(z)
        return z.logsumexp(-1)

    Comparison(strict=False).check(loss)


def test_entries_from_before_a_write() -> None:
    """What code got of logits is what they turn out to be, unless code wrote to them since."""
    c = Comparison(strict=False)

    def entries(z: Any) -> tuple[Tensor, ...]:
        rows = z.view(-1, V)
        largest = rows.topk(3).values
        z[:, 0] = 7.0
        return largest, rows[:7].exp(), z.exp()

    with torch.no_grad():
        ours, plain = (entries(z) for z in both(c))
    torch.testing.assert_close(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1]) and torch.equal(ours[2], plain[2])


def test_a_copy_from_before_a_write_is_an_error() -> None:
    c = Comparison(dtype=torch.bfloat16, strict=False)
    with torch.no_grad():
        z = c.lazy.head(c.lazy.hidden)
    upcast = z.float()
    z.zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        upcast.norm()


def test_a_view_from_before_a_lazy_write_is_an_error() -> None:
    """Also where a copy has computed the logits from before it, which are not the memory's now."""
    c = Comparison(strict=False)
    with torch.no_grad():
        z, plain = both(c)
        view, copied, expected = z[1:], z.clone(), plain.clone()
        z.neg_(), plain.neg_()
        torch.testing.assert_close(copied.exp(), expected.exp())
        torch.testing.assert_close(z.logsumexp(-1), plain.logsumexp(-1))
        for use in (lambda: view.logsumexp(-1), lambda: view.exp()):
            with pytest.raises(RuntimeError, match="modified in place"):
                use()
        view = z[1:]
        z.zero_()
        assert view.count_nonzero() == 0


def test_a_computed_copy_survives_a_write() -> None:
    c = Comparison(dtype=torch.bfloat16, strict=False)
    with torch.no_grad():
        z, plain = both(c)
    upcast = z.float()
    upcast.dense()
    z.zero_()
    assert torch.equal(upcast.dense(), plain.float()) and z.count_nonzero() == 0


def test_logits_computed_without_gradients_keep_their_graph() -> None:
    c = Comparison(strict=False)
    z, plain = both(c)
    with torch.no_grad():
        assert not z.std().requires_grad
    z.square().sum().backward()
    plain.square().sum().backward()
    assert torch.equal(c.lazy.hidden.grad, c.plain.hidden.grad)


@pytest.mark.parametrize("operation", ["none", "view"])
def test_logits_made_without_gradients_have_none(operation: str) -> None:
    c = Comparison(strict=False)
    with torch.no_grad():
        z = c.lazy.head(c.lazy.hidden)
    z = z if operation == "none" else z[:, 1:]
    assert not z.requires_grad and z.is_leaf
    assert not z.logsumexp(-1).requires_grad and not z.exp().requires_grad
    inside = c.lazy.head(c.lazy.hidden)
    with torch.no_grad():
        halved = inside / 2
    assert not halved.requires_grad and not halved.logsumexp(-1).requires_grad
    assert not inside.detach().logsumexp(-1).requires_grad


def test_gradient_of_logits() -> None:
    c = Comparison(strict=False)
    z, plain = both(c)
    for logits in (z, plain):
        logits.retain_grad()
        F.cross_entropy(logits.view(-1, V), torch.arange(15)).backward()
    assert torch.equal(z.grad, plain.grad)
    z, plain = both(c)
    seen = []
    for logits in (z, plain):
        logits.register_hook(seen.append)
        logits[:, 1:].logsumexp(-1).sum().backward()
    assert torch.equal(*seen)
    z, _ = both(c)
    loss = z.logsumexp(-1).sum()
    with pytest.raises(RuntimeError, match=r"call .dense\(\)"):
        torch.autograd.grad(loss, z)
    z.dense()
    [gradient] = torch.autograd.grad(z.logsumexp(-1).sum(), z)
    assert gradient.shape == (3, 5, V)


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(head_dtype: torch.dtype, inside: bool) -> None:
    """The dtypes of plain code, with the loss inside or outside of autocast's region."""
    c = Comparison(dtype=head_dtype)
    y = torch.randint(V, (15,))

    def losses(logits: Any) -> dict[str, Any]:
        flat = logits.view(-1, V)
        return {
            "cross_entropy": F.cross_entropy(flat, y),
            "nll_loss": F.nll_loss(F.log_softmax(flat, -1), y),
            "log_softmax": F.log_softmax(flat, -1),
            "lse": flat.logsumexp(-1),
            "sum": flat.sum(-1),
            "gather": flat.gather(-1, y[:, None]),
            "scaled": flat / 2.0,
        }

    for autocast_dtype in (torch.bfloat16, torch.float16):
        results = []
        for side in (c.lazy, c.plain):
            with torch.autocast("cpu", autocast_dtype):
                logits = side.head(side.hidden)
                assert logits.dtype == autocast_dtype
                if inside:
                    results.append(losses(logits))
            if not inside:
                results.append(losses(logits))
        ours, plain = results
        for name in plain:
            assert ours[name].dtype == plain[name].dtype, name
        ours["cross_entropy"].backward()
        plain["cross_entropy"].backward()
        torch.testing.assert_close(
            c.lazy.head.weight.grad, c.plain.head.weight.grad, rtol=0.05, atol=1e-3
        )
        c.lazy.head.zero_grad(), c.plain.head.zero_grad()


def test_autocast_of_float32_logits_computes_in_float32() -> None:
    c = Comparison()

    def loss(z: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(z.view(-1, V), torch.arange(15))

    c.check(loss)


def test_changed_weight_or_hidden_states_are_an_error() -> None:
    c = Comparison(strict=False)
    z, scaled = c.lazy.head(c.lazy.hidden), c.lazy.head(c.lazy.hidden) / 2
    kept = c.lazy.head(c.lazy.hidden)
    values = kept.dense().clone()
    with torch.no_grad():
        c.lazy.head.weight.add_(1.0)
    for logits in (z, scaled):
        with pytest.raises(RuntimeError, match="weight of a head was modified"):
            logits.logsumexp(-1)
    assert torch.equal(kept.dense(), values)
    with torch.no_grad():
        z = c.lazy.head(c.lazy.hidden)
        c.lazy.hidden.add_(1.0)
    for use in (lambda: z.logsumexp(-1), lambda: z[:, 1:], lambda: z.dense()):
        with pytest.raises(RuntimeError, match="hidden states were modified"):
            use()


def test_changed_bias_is_an_error() -> None:
    """Of the head, as where only biases are trained, or added by code."""
    c = Comparison(bias=True, strict=False)
    added = torch.randn(V)
    for bias in (c.lazy.head.bias, added):
        z = c.lazy.head(c.lazy.hidden) + added
        values = z.logsumexp(-1)
        with torch.no_grad():
            bias.add_(1.0)
        with pytest.raises(RuntimeError, match="bias of a head was modified"):
            z.argmax(-1)
        torch.testing.assert_close((c.lazy.head(c.lazy.hidden) + added).logsumexp(-1), values + 1.0)


def test_functional_call_uses_the_given_weight() -> None:
    c = Comparison()
    weight = torch.randn(V, FEATURES, requires_grad=True)
    results = []
    for side in (c.lazy, c.plain):
        logits = torch.func.functional_call(side.head, {"weight": weight}, (side.hidden,))
        results.append(logits.logsumexp(-1))
    torch.testing.assert_close(*results)
    ours, plain = (torch.autograd.grad(r.sum(), weight)[0] for r in results)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("loss_inside", [False, True])
def test_checkpoint(reentrant: bool, loss_inside: bool) -> None:
    c = Comparison(strict=False)
    y = torch.randint(V, (15,))

    def loss_of(logits: Any) -> Tensor:
        return F.cross_entropy(logits.view(-1, V), y)

    for side in (c.lazy, c.plain):

        def forward(hidden: Tensor, side: Any = side) -> Any:
            logits = side.head(hidden)
            return loss_of(logits) if loss_inside else logits

        result = checkpoint(forward, side.hidden, use_reentrant=reentrant)
        loss = result if loss_inside else loss_of(result)
        if side is c.lazy and reentrant and not loss_inside:
            # It looks for Tensors in what the second run of forward returns.
            with pytest.raises(RuntimeError, match="none of output has requires_grad"):
                loss.backward()
            return
        loss.backward()
    torch.testing.assert_close(c.lazy.hidden.grad, c.plain.hidden.grad)
    torch.testing.assert_close(c.lazy.head.weight.grad, c.plain.head.weight.grad)


def test_checkpoint_of_a_loss_alone() -> None:
    """It saves the same tensors when it runs again, whatever is known of the logits by then."""

    def statistics(z: Any) -> Tensor:
        log_p = z.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return z.logsumexp(-1) + entropy + log_p.sum(-1)

    Comparison().check(lambda z: checkpoint(statistics, z, use_reentrant=False))


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        logits = logits.view(-1, V)
        ctx.save_for_backward(logits.softmax(-1), target)
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        p, target = ctx.saved_tensors
        return gradient * (p - F.one_hot(target, V)).view(3, 5, V) / len(target), None


def test_functions_of_autograd_that_get_logits() -> None:
    """Autograd gives no gradient to an argument that is no Tensor: an error, not a smaller one."""
    c = Comparison(strict=False)
    target = torch.randint(V, (15,))
    z, plain = both(c)
    for apply in (
        lambda: CrossEntropy.apply(z, target),
        lambda: checkpoint(lambda z: z.logsumexp(-1), z, use_reentrant=True),
        lambda: checkpoint(lambda z: z.std(), z, use_reentrant=True),
    ):
        with pytest.raises(RuntimeError, match=r"was given lazy logits.*logits\.dense\(\)"):
            apply()
    CrossEntropy.apply(z.dense(), target).backward()
    F.cross_entropy(plain.view(-1, V), target).backward()
    torch.testing.assert_close(c.lazy.hidden.grad, c.plain.hidden.grad)
    with torch.no_grad():
        z, plain = both(c)
        torch.testing.assert_close(*(CrossEntropy.apply(logits, target) for logits in (z, plain)))


def test_a_leaf_made_of_detached_logits() -> None:
    """Gradients of logits first, then those of the model, as gradient caches do."""
    c = Comparison(strict=False)
    target = torch.randint(V, (3, 5))
    for side in (c.lazy, c.plain):
        z = side.head(side.hidden)
        leaf = z.detach().requires_grad_()
        joined = torch.cat([leaf, leaf])
        loss = F.cross_entropy(target=target, input=leaf.transpose(1, 2)) + joined.square().mean()
        loss.backward()
        (z * leaf.grad + z.logsumexp(-1, keepdim=True)).sum().backward()
    torch.testing.assert_close(c.lazy.hidden.grad, c.plain.hidden.grad)
    torch.testing.assert_close(c.lazy.head.weight.grad, c.plain.head.weight.grad)


def test_a_wrapper_that_became_part_of_a_graph() -> None:
    """requires_grad_ on logits of an evaluation makes them a leaf, as it does plain ones."""
    c = Comparison(strict=False)
    with torch.no_grad():
        z, plain = both(c)
    for logits in (z, plain):
        logits.requires_grad_()
        assert logits.requires_grad and logits.is_leaf
        logits.logsumexp(-1).sum().backward()
    assert torch.equal(torch.as_tensor(z.grad), plain.grad)


def test_transforms_get_plain_logits() -> None:
    c = Comparison(strict=False)

    def loss(side: Any, hidden: Tensor) -> Tensor:
        return side.head(hidden).logsumexp(-1).sum()

    with pytest.warns(UserWarning, match=r"transform of torch\.func"):
        ours = torch.func.grad(lambda h: loss(c.lazy, h))(c.lazy.hidden)
    plain = torch.func.grad(lambda h: loss(c.plain, h))(c.plain.hidden)
    assert torch.equal(ours, plain)
    mapped = torch.vmap(lambda h: c.lazy.head(h).logsumexp(-1))(c.lazy.hidden)
    torch.testing.assert_close(mapped, c.plain.head(c.plain.hidden).logsumexp(-1))


def test_inference_mode() -> None:
    c = Comparison(strict=False)
    with torch.inference_mode():
        z, plain = both(c)
        assert torch.equal(z.argmax(-1), plain.argmax(-1)) and torch.equal(z.exp(), plain.exp())
    torch.testing.assert_close(z.logsumexp(-1), plain.logsumexp(-1))


def test_second_derivatives_are_an_error() -> None:
    c = Comparison()
    loss = c.lazy.head(c.lazy.hidden).logsumexp(-1).sum()
    [gradient] = torch.autograd.grad(loss, c.lazy.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


def test_one_pass_for_statistics_of_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    from memeff.lazy import reductions

    calls = []
    real = memeff.linear_token_statistics
    monkeypatch.setattr(
        reductions, "linear_token_statistics", lambda *a, **k: calls.append(k) or real(*a, **k)
    )
    c = Comparison()
    z = c.lazy.head(c.lazy.hidden)
    log_probs = -z.log_softmax(-1)
    loss = log_probs.gather(-1, torch.zeros(3, 5, 1, dtype=torch.int64)).sum()
    loss = loss + log_probs.sum(-1).sum() + z.logsumexp(-1).sum()
    assert len(calls) == 1
    loss.backward()
    with torch.no_grad():
        assert not z.logsumexp(-1).requires_grad
    assert len(calls) == 1
