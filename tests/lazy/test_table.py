"""Every row of the table of operations: values, gradients and dtypes against the plain head.

strict=True makes any computation of the logits an error, so that a case that passes ran without
them; `test_every_row_has_a_case` keeps the list complete.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lazy_cases import FEATURES, VOCAB, Comparison
from torch import Tensor

from memeff.lazy.carriers import Carrier
from memeff.lazy.table import TABLE

V = VOCAB
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def targets(*shape: int, ignored: float = 0.3) -> Tensor:
    y = torch.randint(V, shape, generator=torch.Generator().manual_seed(1))
    y[torch.rand(shape, generator=torch.Generator().manual_seed(2)) < ignored] = -100
    return y


Y = targets(3, 5)
INDEX = targets(3, 5, ignored=0).unsqueeze(-1)
CLASS_WEIGHT = torch.rand(V, generator=torch.Generator().manual_seed(3)) + 0.1
PROBABILITIES = torch.randn(3, 5, V, generator=torch.Generator().manual_seed(4)).softmax(-1)
BIAS = torch.randn(V, generator=torch.Generator().manual_seed(5))


def flat(z: Any) -> Any:
    return z.view(-1, V)


def ce(z: Any, y: Tensor = Y, **options: Any) -> Tensor:
    return F.cross_entropy(flat(z), y.reshape(-1), **options)


def probe(z: Any) -> Tensor:
    """Something of every token, to read from logits of any leading shape."""
    return z.logsumexp(-1)


def ce_like(z: Any, **options: Any) -> Tensor:
    """A loss whose class weights and probabilities have the dtype of the logits."""
    weight = options.pop("weight", None)
    if weight is not None:
        options["weight"] = weight.to(z.dtype)
    return ce(z, **options)


def label_smoother(z: Any) -> tuple[Tensor, Tensor]:
    """transformers.trainer_pt_utils.LabelSmoother."""
    log_probs = -F.log_softmax(z, dim=-1)
    nll = log_probs.gather(dim=-1, index=INDEX)
    smoothed = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32)
    return nll, smoothed


def entropy_from_logits(z: Any) -> Tensor:
    p = F.softmax(z, dim=-1)
    return torch.logsumexp(z, dim=-1) - torch.sum(p * z, dim=-1)


def entropy_from_log_softmax(z: Any) -> Tensor:
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def in_place(function: Callable[[Any], Any]) -> Callable[[Any], Tensor]:
    """The function writes into a copy of the logits, as leaves of a graph want it."""

    def run(z: Any) -> Tensor:
        z = z.clone()
        result = function(z)
        return probe(z) + probe(result)

    return run


# name -> function of logits [3, 5, V]; the name begins with that of a row.
CASES: dict[str, Callable[[Any], Any]] = {
    "cross_entropy": ce,
    "cross_entropy sum": lambda z: ce(z, reduction="sum"),
    "cross_entropy none": lambda z: ce(z, reduction="none"),
    "cross_entropy ignore_index": lambda z: ce(z, INDEX, ignore_index=int(INDEX[0, 0, 0])),
    "cross_entropy smoothing": lambda z: ce(z, label_smoothing=0.1),
    "cross_entropy weight": lambda z: ce_like(z, weight=CLASS_WEIGHT),
    "cross_entropy weight sum smoothing": lambda z: ce_like(
        z, weight=CLASS_WEIGHT, reduction="sum", label_smoothing=0.2
    ),
    "cross_entropy probabilities": lambda z: F.cross_entropy(
        flat(z), flat(PROBABILITIES).to(z.dtype)
    ),
    "cross_entropy probabilities BVT": lambda z: F.cross_entropy(
        z.transpose(1, 2), PROBABILITIES.to(z.dtype).transpose(1, 2), reduction="none"
    ),
    "cross_entropy keywords": lambda z: F.cross_entropy(input=flat(z), target=Y.view(-1)),
    "cross_entropy module": lambda z: torch.nn.CrossEntropyLoss(label_smoothing=0.1)(
        flat(z), Y.view(-1)
    ),
    "cross_entropy BVT": lambda z: F.cross_entropy(z.permute(0, 2, 1), Y),
    "cross_entropy BVT none": lambda z: F.cross_entropy(z.transpose(1, 2), Y, reduction="none"),
    "cross_entropy one token": lambda z: F.cross_entropy(z[1, 2], INDEX[1, 2, 0]),
    "cross_entropy upcast": lambda z: ce(z.float()),
    "cross_entropy shifted": lambda z: F.cross_entropy(
        z.float()[..., :-1, :].contiguous().view(-1, V), Y[..., 1:].reshape(-1)
    ),
    "nll_loss": lambda z: F.nll_loss(flat(z).log_softmax(-1), Y.view(-1)),
    "nll_loss sum": lambda z: F.nll_loss(flat(z).log_softmax(-1), Y.view(-1), reduction="sum"),
    "nll_loss none BVT": lambda z: F.nll_loss(
        z.log_softmax(-1).transpose(1, 2), Y, reduction="none"
    ),
    "nll_loss weight": lambda z: F.nll_loss(
        flat(z).log_softmax(-1), Y.view(-1), CLASS_WEIGHT.to(z.dtype)
    ),
    "nll_loss factor": lambda z: F.nll_loss(-2 * flat(z).log_softmax(-1), Y.view(-1)),
    "mul": lambda z: probe(z * 0.7),
    "mul torch": lambda z: probe(torch.multiply(z, 0.7)),
    "mul tensor": lambda z: probe(z * torch.tensor(0.7)),
    "mul log_softmax": lambda z: (z.log_softmax(-1) * 0.7).gather(-1, INDEX),
    "multiply": lambda z: probe(z.multiply(-1.3)),
    "__mul__": lambda z: probe(-1.3 * z) + probe(z * 2),
    "__rmul__": lambda z: probe(0.3 * z),
    "div": lambda z: probe(z.div(3.0)),
    "divide": lambda z: probe(torch.divide(z, 3)),
    "true_divide": lambda z: probe(z.true_divide(3)),
    "__truediv__": lambda z: probe(z / 3.0),
    "neg": lambda z: probe(torch.neg(z)),
    "negative": lambda z: probe(z.negative()),
    "__neg__": lambda z: probe(-z),
    "tanh": lambda z: probe(torch.tanh(z)),
    "tanh soft cap": lambda z: probe(5.0 * torch.tanh(z / 5.0)),
    "tanh soft cap scaled": lambda z: ce(torch.tanh(z / 5.0) * 5.0 / 1.7),
    "tanh soft cap negative": lambda z: probe(torch.tanh(z / 5.0) * -4.0),
    "mul_": in_place(lambda z: z.mul_(0.7)),
    "multiply_": in_place(lambda z: z.multiply_(0.7)),
    "__imul__": in_place(lambda z: z.__imul__(0.7)),
    "div_": in_place(lambda z: z.div_(3.0)),
    "divide_": in_place(lambda z: z.divide_(3.0)),
    "true_divide_": in_place(lambda z: z.true_divide_(3.0)),
    "__itruediv__": in_place(lambda z: z.__itruediv__(3.0)),
    "neg_": in_place(lambda z: z.neg_()),
    "negative_": in_place(lambda z: z.negative_()),
    "tanh_": in_place(lambda z: z.tanh_()),
    "exp": lambda z: z.log_softmax(-1).exp().gather(-1, INDEX),
    "add bias": lambda z: probe(z + BIAS.to(z.dtype)),
    "add bias 1V": lambda z: probe(torch.add(z, BIAS.to(z.dtype)[None, None])),
    "__add__": lambda z: ce(z + BIAS.to(z.dtype)),
    "__radd__": lambda z: probe(BIAS.to(z.dtype) + z),
    "float": lambda z: probe(z.float()),
    "double": lambda z: probe(z.double()),
    "half": lambda z: probe(z.half()),
    "bfloat16": lambda z: probe(z.bfloat16()),
    "to": lambda z: probe(z.to(torch.float32)),
    "to device": lambda z: probe(z.to("cpu", torch.float32)),
    "to tensor": lambda z: probe(z.to(torch.zeros(1, dtype=torch.float32))),
    "to copy": lambda z: probe(z.to(copy=True, dtype=torch.float32, device=z.device)),
    "type": lambda z: ce(z.type(torch.float32)),
    "cpu": lambda z: probe(z.cpu()),
    "type_as": lambda z: probe(z.type_as(torch.zeros(1))),
    "clone": lambda z: probe(z.clone(memory_format=torch.contiguous_format)),
    "contiguous": lambda z: probe(z[:, 1:].contiguous()),
    "detach": lambda z: probe(z.detach()),
    "view": lambda z: probe(z.view(15, V)),
    "view tuple": lambda z: probe(z.view((5, -1, V))),
    "view last": lambda z: probe(z.view(15, -1)),
    "reshape": lambda z: probe(torch.reshape(z[:, 1:], (-1, V))),
    "reshape keyword": lambda z: probe(torch.reshape(z, shape=(-1, V))),
    "flatten": lambda z: probe(z.flatten(0, 1)),
    "flatten to": lambda z: probe(z.flatten(end_dim=-2)),
    "unflatten": lambda z: probe(flat(z).unflatten(0, (5, 3))),
    "squeeze": lambda z: probe(z[:, :1].squeeze(1)),
    "unsqueeze": lambda z: probe(z.unsqueeze(0)),
    "unsqueeze before classes": lambda z: probe(z.unsqueeze(-2)),
    "narrow": lambda z: probe(z.narrow(1, 1, 3)),
    "select": lambda z: probe(z.select(1, -1)),
    "index_select": lambda z: probe(torch.index_select(z, 1, torch.tensor([4, 0, 0]))),
    "split": lambda z: [probe(part) for part in z.split([2, 3], dim=1)],
    "split size": lambda z: [probe(part) for part in torch.split(z, 2)],
    "chunk": lambda z: [probe(part) for part in z.chunk(2, dim=1)],
    "unbind": lambda z: [probe(part) for part in z.unbind(1)],
    "__getitem__ slices": lambda z: probe(z[..., :-1, :]) * probe(z[:, 1:]),
    "__getitem__ all": lambda z: probe(z[:, -2:, :]),
    "__getitem__ int": lambda z: probe(z[1]) + probe(z[-1, :, :]),
    "__getitem__ none": lambda z: probe(z[None, :, 2]),
    "__getitem__ mask": lambda z: probe(z[Y != -100]),
    "__getitem__ mask of rows": lambda z: probe(z[torch.tensor([True, False, True])]),
    "__getitem__ list": lambda z: probe(z[[2, 0]]),
    "__getitem__ tensors": lambda z: probe(z[torch.arange(3), torch.tensor([4, 0, 2])]),
    "__getitem__ tensors and all": lambda z: probe(
        z[torch.arange(3), torch.tensor([4, 0, 2]), :]
    ),
    "transpose": lambda z: probe(z.transpose(0, 1)),
    "transpose there and back": lambda z: probe(z.transpose(1, 2).transpose(-1, -2)),
    "swapaxes": lambda z: probe(z.swapaxes(0, 1)),
    "swapdims": lambda z: probe(z.swapdims(0, 1)),
    "permute": lambda z: probe(z.permute(2, 1, 0).permute(2, 1, 0)),
    "permute keyword": lambda z: probe(torch.permute(z, dims=[1, 0, 2])),
    "permute lead": lambda z: probe(z.permute((1, 0, 2))),
    "movedim": lambda z: F.cross_entropy(z.movedim(-1, 1), Y, reduction="none"),
    "moveaxis": lambda z: probe(z.moveaxis(0, 1)),
    "log_softmax gather": lambda z: F.log_softmax(z, dim=-1).gather(-1, INDEX),
    "log_softmax dtype": lambda z: torch.log_softmax(z, -1, dtype=torch.float32).gather(-1, INDEX),
    "softmax gather": lambda z: z.softmax(-1).gather(-1, INDEX),
    "softmax max": lambda z: F.softmax(z, dim=-1, dtype=torch.float32).max(-1).values,
    "take_along_dim": lambda z: torch.take_along_dim(z.log_softmax(-1), INDEX, 2),
    "gather": lambda z: torch.gather(z, 2, INDEX),
    "gather several": lambda z: z.gather(-1, torch.cat([INDEX, (INDEX + 5) % V], -1)),
    "logsumexp": lambda z: torch.logsumexp(z, dim=-1, keepdim=True),
    "logsumexp tuple": lambda z: z.logsumexp((-1,)),
    "argmax": lambda z: z.argmax(-1),
    "argmax keepdim": lambda z: torch.argmax(z * -0.5, dim=2, keepdim=True),
    "argmax log_softmax": lambda z: z.log_softmax(-1).argmax(-1),
    "max": lambda z: tuple(torch.max(z, dim=-1)),
    "max log_softmax": lambda z: z.log_softmax(-1).max(-1, keepdim=True)[0],
    "topk": lambda z: z.topk(5)[0],
    "topk ids": lambda z: torch.topk(z.float(), 3, dim=-1).indices,
    "topk log_softmax": lambda z: z.log_softmax(-1).topk(4, dim=-1).values,
    "sum": lambda z: (z * 0.5).sum(-1),
    "sum log_softmax": lambda z: z.log_softmax(-1).sum(dim=-1, keepdim=True),
    "sum smoother": label_smoother,
    "sum entropy": entropy_from_logits,
    "sum entropy of log_softmax": entropy_from_log_softmax,
    "sum entropy reversed": lambda z: (z.log_softmax(-1) * z.softmax(-1)).sum(-1),
    "sum all": lambda z: (z * 0.5).sum(),
    "sum all of BVT": lambda z: z.log_softmax(-1).transpose(1, 2).sum(),
    "mean": lambda z: z.mean(dim=-1),
    "sum capped": lambda z: (torch.tanh(z / 3) * 3).sum(-1),
    "sum capped log_softmax": lambda z: torch.tanh(z).log_softmax(-1).sum(-1),
    "mean all": lambda z: z[:2].mean(),
    "mean log_softmax": lambda z: -z.log_softmax(-1).mean(-1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_row_in_float32(name: str) -> None:
    Comparison(bias=True).check(CASES[name])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_row_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    Comparison(dtype=dtype).check(CASES[name])


def test_every_row_has_a_case() -> None:
    tried = {name.split()[0] for name in CASES}
    rows = {row.name for row in TABLE.values() if not row.silent}
    assert rows - tried == set()


def test_every_case_of_metadata() -> None:
    comparison = Comparison(dtype=torch.bfloat16)
    lazy = comparison.lazy.head(comparison.lazy.hidden)
    plain = comparison.plain.head(comparison.plain.hidden)
    assert lazy.detach().grad_fn is None
    for name in {row.name for row in TABLE.values() if row.silent} - {"grad_fn"}:
        ours, theirs = getattr(lazy, name), getattr(plain, name)
        assert (ours() == theirs()) if callable(ours) else (ours == theirs), name
    assert lazy.device == plain.device and lazy.size(-1) == V and lazy.size()[0] == 3
    assert torch.is_floating_point(lazy) and torch.numel(lazy) == 15 * V and len(lazy) == 3


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0), (4, 1, 3)], ids=str)
def test_leading_shapes(lead: tuple[int, ...]) -> None:
    comparison = Comparison(lead)
    comparison.check(lambda z: z.logsumexp(-1))
    y = torch.randint(V, lead)
    comparison.check(
        lambda z: F.cross_entropy(
            z.view(-1, V) if lead else z, y.view(-1) if lead else y, reduction="sum"
        )
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "function",
    [
        lambda z: z.std(-1),
        lambda z: z + 1.0,
        lambda z: z.masked_fill(z < 0, -1.0)[..., 3],
        lambda z: z.float().pow(2).mean(),
        lambda z: torch.tanh(z / 7.0)[:, 1:].exp(),
        lambda z: z.log_softmax(-1).square(),
        lambda z: z.transpose(1, 2).softmax(1).permute(0, 2, 1) * 2,
        lambda z: torch.cat([z, z], 1),
        lambda z: torch.stack(list(z)),
        lambda z: torch.where(z > 0, z, z / 2),
        lambda z: z[..., 3:9] - z[..., :6],
        lambda z: z.amin(),
        lambda z: z.sort(-1).values,
        lambda z: z.T if z.dim() == 2 else z.mT,
        lambda z: F.kl_div(z.log_softmax(-1), z.detach().softmax(-1), reduction="batchmean"),
        lambda z: z.split(2)[1].norm(),
        lambda z: z * z,
    ],
)  # fmt: skip
def test_anything_else_is_what_the_plain_head_gives(function: Any, dtype: torch.dtype) -> None:
    """Bit for bit, gradients included."""
    c = Comparison(dtype=dtype, strict=False)
    with pytest.warns(UserWarning, match="computed the logits"):
        ours = function(c.lazy.head(c.lazy.hidden))
    plain = function(c.plain.head(c.plain.hidden))
    assert type(ours) is Tensor and ours.dtype == plain.dtype and torch.equal(ours, plain)
    g = torch.randn(plain.shape).to(plain.dtype)
    ours.backward(g)
    plain.backward(g)
    for name, leaf in c.lazy.leaves.items():
        assert torch.equal(leaf.grad, c.plain.leaves[name].grad), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", [lambda z: z / 0.7, lambda z: z.log_softmax(-1), torch.softmax])
def test_entries_are_equal_to_those_of_computed_logits(of: Any, dtype: torch.dtype) -> None:
    """Samplers mask what is less than the k-th largest; others ask what equals the maximum."""
    c = Comparison((40,), dtype=dtype, strict=False)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits = c.lazy.head(c.lazy.hidden)
            z = torch.softmax(logits, -1) if of is torch.softmax else of(logits)
            values, classes = z.topk(5, dim=-1)
            largest = z.max(-1, keepdim=True).values
            assert torch.equal(largest, values[:, :1])
            assert torch.equal(z.gather(-1, classes), values)
            assert ((z >= values[:, -1:]).gather(-1, classes)).all()
            assert ((z == largest).gather(-1, z.argmax(-1, keepdim=True))).all()


def test_materialises_once() -> None:
    c = Comparison(strict=False)
    z = c.lazy.head(c.lazy.hidden)
    halves = z / 2
    calls = []
    real, torch.nn.functional.linear = F.linear, lambda *a: calls.append(a) or real(*a)
    try:
        with pytest.warns(UserWarning):
            z.std()
        halves.float().norm()
        z.view(-1, V).exp()
    finally:
        torch.nn.functional.linear = real
    assert not calls or len(calls) == 1
    assert z.dense() is z.dense()


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda z: z[7], IndexError),
        (lambda z: z[0, 0, V], IndexError),
        (lambda z: z[0, 0, 0, 0], IndexError),
        (lambda z: z.view(7, V), RuntimeError),
        (lambda z: z.transpose(0, 5), IndexError),
        (lambda z: z.squeeze(5), IndexError),
        (lambda z: z.gather(-1, INDEX + V), RuntimeError),
        (lambda z: z.log_softmax(-1).gather(-1, Y.unsqueeze(-1)), RuntimeError),  # -100
        (lambda z: ce(z, Y + V), IndexError),
        (lambda z: ce(z, Y[:2]), ValueError),
        (lambda z: ce(z, Y.double()), RuntimeError),
        (lambda z: ce(z, reduction="median"), ValueError),
        (lambda z: ce(z, label_smoothing=2.0), RuntimeError),
        (lambda z: z.no_such_method(), AttributeError),
        (lambda z: z.topk(V + 1), RuntimeError),
        (lambda z: z.mul(other=2, nonsense=3), TypeError),
    ],
)
@pytest.mark.filterwarnings("ignore:.*computed the logits")
def test_errors_are_those_of_plain_logits(function: Any, error: Any) -> None:
    c = Comparison(strict=False)
    for side in (c.plain, c.lazy):
        with pytest.raises(error):
            function(side.head(side.hidden))


def test_strict_names_the_line() -> None:
    c = Comparison(strict=True)
    z = c.lazy.head(c.lazy.hidden)
    with pytest.raises(RuntimeError, match=r"Tensor.std at .*test_table.py:\d+ needs the logits"):
        z.std()


def test_report() -> None:
    c = Comparison(strict=False)
    z = c.lazy.head(c.lazy.hidden)
    assert isinstance(z, Carrier)
    ce(z)
    assert not c.report.materialised and c.report.without_logits["cross_entropy"] == 1
    with pytest.warns(UserWarning, match=r"Tensor.std computed the logits"):
        z.std()
    z.std()
    [entry] = c.report.materialised.values()
    assert entry.count == 1 and "test_table.py:" in entry.where
    text = str(c.report)
    assert "1 x cross_entropy" in text and "Tensor.std, first at" in text
    assert c.lazy.hidden.shape[-1] == FEATURES
