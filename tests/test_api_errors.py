"""Bad input: an error that names the argument, its value and what was expected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import memeff
import memeff.functional

N, D, V = 5, 6, 9


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "input": torch.randn(N, D, requires_grad=True),
        "linear_weight": torch.randn(V, D, requires_grad=True),
        "target": torch.randint(V, (N,)),
    } | changes


# name: (changes, type of the error, texts that the message must contain)
BAD: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "input is a list": ({"input": [1.0]}, TypeError, ("input", "list", "Tensor")),
    "target is an int": ({"target": 3}, TypeError, ("target", "int", "Tensor")),
    "weight is a list": ({"weight": [1.0] * V}, TypeError, ("weight", "list", "Tensor")),
    "scalar input": ({"input": torch.tensor(1.0)}, RuntimeError, ("input", "0 dimensions")),
    "flat weight": (
        {"linear_weight": torch.randn(D)}, RuntimeError, ("linear_weight", f"({D},)", "[V, D]"),
    ),
    "features": (
        {"linear_weight": torch.randn(V, D + 1)}, RuntimeError,
        ("linear_weight", f"({V}, {D + 1})", f"expected {D} features"),
    ),
    "one row with K-dimensional weight": (
        {"input": torch.randn(D), "linear_weight": torch.randn(V, 2, D)}, RuntimeError,
        ("input", f"({D},)", "K-dimensional"),
    ),
    "length of target": (
        {"target": torch.zeros(N + 1).long()}, RuntimeError, ("target", f"({N + 1},)", f"({N},)"),
    ),
    "rank of target": (
        {"target": torch.zeros(N, 1).long()}, RuntimeError, ("target", f"({N}, 1)", f"({N},)"),
    ),
    "flattened target": (
        {"input": torch.randn(2, 3, D), "target": torch.zeros(6).long()}, RuntimeError,
        ("target", "(6,)", "(2, 3)"),
    ),
    "bias": (
        {"linear_bias": torch.randn(V, 1)}, RuntimeError, ("linear_bias", f"({V}, 1)", f"({V},)"),
    ),
    "class weights": (
        {"weight": torch.rand(V - 1)}, RuntimeError,
        ("weight", f"({V - 1},)", f"({V},)"),
    ),
    "token weights": (
        {"token_weight": torch.rand(N, 1)}, RuntimeError, ("token_weight", f"({N}, 1)", f"({N},)"),
    ),
    "integer input": (
        {"input": torch.ones(N, D).long(), "linear_weight": torch.ones(V, D).long()}, RuntimeError,
        ("input", "torch.int64", "torch.bfloat16"),
    ),
    "complex input": (
        {"input": torch.randn(N, D).cfloat()}, RuntimeError, ("input", "torch.complex64"),
    ),
    "float16 with bfloat16": (
        {"input": torch.randn(N, D).half(), "linear_weight": torch.randn(V, D).bfloat16()},
        RuntimeError, ("linear_weight", "torch.bfloat16", "torch.float16"),
    ),
    "bias of another dtype": (
        {"linear_bias": torch.randn(V).double()}, RuntimeError,
        ("linear_bias", "torch.float64", "torch.float32"),
    ),
    "integer class weights": (
        {"weight": torch.ones(V).long()}, RuntimeError, ("weight", "torch.int64", "floating"),
    ),
    "integer token weights": (
        {"token_weight": torch.ones(N).long()}, RuntimeError,
        ("token_weight", "torch.int64", "floating"),
    ),
    "float indices": (
        {"target": torch.zeros(N)}, RuntimeError, ("target", "torch.float32", "torch.int64"),
    ),
    "bool indices": (
        {"target": torch.zeros(N).bool()}, RuntimeError, ("target", "torch.bool", "torch.int64"),
    ),
    "integer probabilities": (
        {"target": torch.zeros(N, V).long()}, RuntimeError, ("target", "torch.int64", "floating"),
    ),
    "weight on another device": (
        {"linear_weight": torch.randn(V, D, device="meta")}, RuntimeError,
        ("linear_weight", "meta", "cpu"),
    ),
    "target on another device": (
        {"target": torch.zeros(N, device="meta").long()}, RuntimeError, ("target", "meta", "cpu"),
    ),
    "token weights on another device": (
        {"token_weight": torch.rand(N, device="meta")}, RuntimeError,
        ("token_weight", "meta", "cpu"),
    ),
    "target too large": (
        {"target": torch.tensor([0, 1, V, 2, V + 5])}, IndexError, (f"{V}", f"[0, {V})", "2"),
    ),
    "target negative": (
        {"target": torch.tensor([0, -1, 1, -100, 2])}, IndexError, ("-1", f"[0, {V})", "1"),
    ),
    "target equal to the default of another ignore_index": (
        {"target": torch.tensor([0, 1, 2, -100, 2]), "ignore_index": 2}, IndexError,
        ("-100", f"[0, {V})"),
    ),
    "ignore_index with probabilities": (
        {"target": torch.rand(N, V), "ignore_index": -100}, RuntimeError,
        ("ignore_index", "-100", "probabilities"),
    ),
    "ignore_index is a float": ({"ignore_index": 1.0}, TypeError, ("ignore_index", "float", "int")),
    "label smoothing negative": (
        {"label_smoothing": -0.1}, ValueError,
        ("label_smoothing", "-0.1", "[0, 1]"),
    ),
    "label smoothing above 1": (
        {"label_smoothing": 1.5}, ValueError,
        ("label_smoothing", "1.5", "[0, 1]"),
    ),
    "label smoothing nan": (
        {"label_smoothing": float("nan")}, ValueError,
        ("label_smoothing", "nan"),
    ),
    "label smoothing is a string": (
        {"label_smoothing": "a"}, TypeError,
        ("label_smoothing", "str"),
    ),
    "reduction": ({"reduction": "average"}, ValueError, ("reduction", "'average'", "'mean'")),
    "backend": ({"backend": "tpu"}, ValueError, ("backend", "'tpu'", "'reference'")),
    "accum_dtype is a string": (
        {"accum_dtype": "float32"}, TypeError, ("accum_dtype", "'float32'", "torch.dtype"),
    ),
    "accum_dtype of 16 bits": (
        {"accum_dtype": torch.bfloat16}, ValueError,
        ("accum_dtype", "torch.bfloat16", "torch.float32", "None"),
    ),
    "accum_dtype finer than the kernels' sums": (
        {"accum_dtype": torch.float64}, ValueError,
        ("accum_dtype", "torch.float64", "torch.float32", "None"),
    ),
    "softcap 0": ({"softcap": 0.0}, ValueError, ("softcap", "0.0", "> 0")),
    "softcap negative": ({"softcap": -30.0}, ValueError, ("softcap", "-30.0", "> 0")),
    "softcap infinite": ({"softcap": float("inf")}, ValueError, ("softcap", "inf", "finite")),
    "logit_scale 0": ({"logit_scale": 0}, ValueError, ("logit_scale", "0")),
    "logit_scale nan": ({"logit_scale": float("nan")}, ValueError, ("logit_scale", "nan")),
    "logit_scale per token": (
        {"logit_scale": torch.ones(2)}, RuntimeError, ("logit_scale", "(2,)", "()"),
    ),
    "logit_scale of ints": (
        {"logit_scale": torch.tensor(2)}, RuntimeError, ("logit_scale", "torch.int64", "floats"),
    ),
    "logit_scale holds 0": (
        {"logit_scale": torch.zeros(())}, ValueError, ("logit_scale", "0", "other than 0"),
    ),
    "logit_scale holds nan": (
        {"logit_scale": torch.tensor(float("nan"))}, ValueError, ("logit_scale", "nan", "finite"),
    ),
    "z_loss negative": ({"z_loss": -1.0}, ValueError, ("z_loss", "-1.0", ">= 0")),
    "num_items negative": ({"num_items": -3}, ValueError, ("num_items", "-3")),
    "num_items with sum": (
        {"num_items": 3, "reduction": "sum"}, ValueError, ("num_items", "'sum'", "mean"),
    ),
    "num_items tensor negative": (
        {"num_items": torch.tensor(-3.0)}, ValueError, ("num_items", "-3", ">= 0"),
    ),
    "num_items nan": ({"num_items": float("nan")}, ValueError, ("num_items", "nan", ">= 0")),
    "num_items of two": (
        {"num_items": torch.tensor([3, 4])}, RuntimeError,
        ("num_items", "(2,)", "one real number"),
    ),
    "num_items is a bool": ({"num_items": True}, TypeError, ("num_items", "bool", "number")),
    "shift negative": ({"shift": -1}, ValueError, ("shift", "-1", ">= 0")),
    "shift is a float": ({"shift": 1.0}, TypeError, ("shift", "float", "int")),
    "shift of one row": (
        {"input": torch.randn(D), "target": torch.tensor(1), "shift": 1}, ValueError,
        ("shift", "1", "time dimension"),
    ),
    "memory_budget without number": (
        {"memory_budget": "lots"}, ValueError, ("memory_budget", "'lots'", "64MiB"),
    ),
    "memory_budget with unknown unit": (
        {"memory_budget": "3 parsecs"}, ValueError, ("memory_budget", "'3 parsecs'", "64MiB"),
    ),
    "memory_budget negative": ({"memory_budget": -5}, ValueError, ("memory_budget", "-5", ">= 0")),
    "memory_budget is a float": ({"memory_budget": 1e9}, TypeError, ("memory_budget", "float")),
    "memory_budget too small": ({"memory_budget": 1}, ValueError, ("memory_budget", "1")),
    "chunk_size 0": ({"chunk_size": 0}, ValueError, ("chunk_size", "0", ">= 1")),
    "chunk_size is a float": ({"chunk_size": 8.0}, TypeError, ("chunk_size", "float")),
    "options of another kind": ({"options": {"chunk": 3}}, TypeError, ("options", "dict")),
    "class weights that require grad": (
        {"weight": torch.rand(V, requires_grad=True)}, RuntimeError, ("weight", "requires grad"),
    ),
    "token weights that require grad": (
        {"token_weight": torch.rand(N, requires_grad=True)}, RuntimeError,
        ("token_weight", "requires grad", "none"),
    ),
    "probabilities that require grad with kernels": (
        {"target": torch.rand(N, V, requires_grad=True), "backend": "cpu"}, RuntimeError,
        ("target", "requires grad", "reference"),
    ),
    "backend cuda": (
        {"backend": "cuda"}, RuntimeError,
        ("input is on cpu", "cuda"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changes, kind, texts = BAD[name]
    call = arguments(**changes)
    with pytest.raises(kind) as caught:
        memeff.linear_cross_entropy(**call)
    for text in texts:
        assert text in str(caught.value), f"{text!r} is not in: {caught.value}"
    for value in call.values():
        if isinstance(value, torch.Tensor):
            assert value.grad is None


def test_first_offending_target_is_named() -> None:
    target = torch.zeros(100, dtype=torch.int64)
    target[37], target[90] = 12345, -3
    with pytest.raises(IndexError, match="12345") as caught:
        memeff.linear_cross_entropy(torch.randn(100, D), torch.randn(V, D), target)
    assert "37" in str(caught.value)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_least_memory_budget_is_named_and_works(reduction: str) -> None:
    """The number in the message is enough, forward and backward; a little less is not."""
    x = torch.randn(512, 64, requires_grad=True)
    w = torch.randn(4096, 64, requires_grad=True)
    target = torch.randint(4096, (512,))
    with pytest.raises(ValueError, match="the minimum is") as caught:
        memeff.linear_cross_entropy(x, w, target, memory_budget=1, reduction=reduction)
    message = str(caught.value)
    least = int(message[message.index("minimum is") :].split()[2])

    def run(memory_budget: int) -> None:
        loss = memeff.linear_cross_entropy(
            x, w, target, memory_budget=memory_budget, reduction=reduction
        )
        loss.sum().backward()

    run(least)
    with pytest.raises(ValueError, match="the minimum is"):
        run(int(least * 0.99))


# Every function that takes a classifier: called with input [N, D], the weight and indices [N].
CALLS: dict[str, Callable[..., Any]] = {
    "linear_cross_entropy": memeff.linear_cross_entropy,
    "linear_token_statistics": memeff.linear_token_statistics,
    "linear_logprobs": memeff.linear_logprobs,
    "linear_loss": lambda x, w, y: memeff.linear_loss(lambda s: -s.logprob, x, w, y),
    "chunked_linear_apply": lambda x, w, y: memeff.chunked_linear_apply(
        lambda z, y: F.cross_entropy(z, y, reduction="sum"), x, w, y
    ),
    "MemoryEfficientLinear": lambda x, w, y: memeff.MemoryEfficientLinear.apply(
        x, w, y, lambda x, linear, y: F.cross_entropy(linear(x), y)
    ),
    "linear_distillation_loss": lambda x, w, _: memeff.losses.linear_distillation_loss(
        x, w, x.detach(), w.detach() if isinstance(w, torch.Tensor) else w
    ),
    "LinearCrossEntropyLoss": lambda x, w, y: memeff.LinearCrossEntropyLoss(linear_weight=w)(x, y),
}
# Those that need all of its rows in one place; the others take a shard, see tests/distributed.
NEED_ALL_ROWS = ("chunked_linear_apply", "MemoryEfficientLinear", "linear_distillation_loss")


@pytest.fixture
def mesh(tmp_path: Any) -> Iterator[Any]:
    """One process on the CPU."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_dtensor_is_refused_and_the_gathered_weight_taken(mesh: Any) -> None:
    """The way out that the message names works; a shard, which gives a wrong loss, is not one."""
    from torch.distributed.tensor import Shard, distribute_tensor

    x, y = torch.randn(N, D), torch.randint(V, (N,))
    plain = torch.randn(V, D, requires_grad=True)
    sharded = distribute_tensor(plain.detach(), mesh, [Shard(0)]).requires_grad_()
    for name, call in CALLS.items():
        if name not in NEED_ALL_ROWS:
            call(x, sharded, y)
            continue
        with pytest.raises(TypeError, match="weight is a DTensor") as caught:
            call(x, sharded, y)
        for text in (
            "Shard(0)",
            "weight.full_tensor()",
            "FSDP",
            "module's forward",
            "memeff.patch",
        ):
            assert text in str(caught.value), name
        assert "to_local" not in str(caught.value)
    for values, texts in (((sharded, plain), "input is"), ((x, plain), "target is")):
        target = distribute_tensor(y, mesh, [Shard(0)])
        with pytest.raises(TypeError, match=f"{texts} a DTensor"):
            memeff.linear_cross_entropy(*values, target)
    memeff.linear_cross_entropy(x, sharded.full_tensor(), y).backward()
    memeff.linear_cross_entropy(x, plain, y).backward()
    gradient: Any = sharded.grad
    torch.testing.assert_close(gradient.full_tensor(), plain.grad)


def test_chunk_size_twice() -> None:
    options_type = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options_type is None:
        pytest.skip(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
    options = options_type(batch_chunk_size=4, chunking_method=None)
    with pytest.raises(ValueError, match=r"chunk_size is 8.*batch_chunk_size is 4"):
        memeff.linear_cross_entropy(**arguments(), options=options, chunk_size=8)


def test_acc_dtype_of_torch_is_honoured_or_refused() -> None:
    options_type = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options_type is None:
        pytest.skip(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
    call = arguments()
    expected = memeff.linear_cross_entropy(**call, accum_dtype=torch.float32)
    options = options_type(acc_dtype=torch.float32)
    assert torch.equal(memeff.linear_cross_entropy(**call, options=options), expected)
    with pytest.raises(ValueError, match=r"accum_dtype is .*options.acc_dtype is torch.float32"):
        memeff.linear_cross_entropy(**call, options=options, accum_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"options.acc_dtype is torch.float16, expected torch.fl"):
        memeff.linear_cross_entropy(**call, options=options_type(acc_dtype=torch.float16))


def test_other_devices_are_refused() -> None:
    from memeff import _library
    from memeff._backends import resolve_backend

    cuda = torch.device("cuda", 1)
    with pytest.raises(RuntimeError, match=r"input is on cuda:1, expected a cpu tensor"):
        resolve_backend("cpu", cuda)
    for backend in ("auto", "cuda"):
        if _library.load().build_info()["cuda"]:
            assert resolve_backend(backend, cuda) == "cuda"
        else:
            with pytest.raises(RuntimeError, match=r"cuda:1.*no kernels for cuda.*reference"):
                resolve_backend(backend, cuda)
    with pytest.raises(RuntimeError, match=r"input is on xpu:0.*no kernels for xpu.*reference"):
        resolve_backend("auto", torch.device("xpu", 0))
    assert resolve_backend("reference", cuda) == "reference"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MiB", 64 * 2**20), ("64 mib", 64 * 2**20), ("1GB", 10**9), ("1.5GiB", 3 * 2**29),
        ("12", 12), ("12B", 12), ("3KB", 3000), ("2TiB", 2**41), (" 7 KiB ", 7168),
        (None, -1), (0, 0), (123, 123),
    ],
)  # fmt: skip
def test_sizes(text: int | str | None, size: int) -> None:
    from memeff._options import parse_options

    assert parse_options(memory_budget=text).memory_budget == size
