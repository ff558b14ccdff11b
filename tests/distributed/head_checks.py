"""memeff.patch on heads whose rows tensor parallelism distributes: no logits on any rank, and the
loss and gradients of the plain tensor-parallel model."""

from __future__ import annotations

import importlib.util
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from checks import Ranks, add, raised
from torch import Tensor, nn

import memeff

VOCAB, FEATURES, BATCH, LENGTH = 37, 16, 3, 8  # an odd vocabulary: uneven shards


class Model(nn.Module):
    def __init__(self, bias: bool = True, part: slice | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, FEATURES)
        self.up = nn.Linear(FEATURES, 2 * FEATURES)
        self.down = nn.Linear(2 * FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, VOCAB, bias=bias)
        self.part = part  # the positions of which the head gets hidden states
        self.outside = False  # whether the loss is computed outside of forward

    def logits(self, ids: Tensor) -> Any:
        x = self.embedding(ids)
        x = x + self.down(F.silu(self.up(x)))
        return self.head(x if self.part is None else x[:, self.part])

    def forward(self, ids: Tensor) -> Any:
        logits = self.logits(ids)
        return logits if self.outside else loss_of(logits, ids)


def loss_of(logits: Any, ids: Tensor) -> Any:
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def ids_of(seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def make(mesh: Any, head: Any, **fields: Any) -> Model:
    """The same model on every rank, tensor-parallel."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(3)
    plan = {"head": head}
    if FEATURES % mesh.size() == 0:
        plan |= {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = parallelize_module(Model(**fields), mesh, plan)
    assert isinstance(model, Model)
    return model


def mesh_of(ranks: Ranks) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(ranks.group, "cpu", mesh_dim_names=("tp",))


def compare_gradients(ours: nn.Module, plain: nn.Module, most: float = 2e-6) -> None:
    for (name, one), (_, other) in zip(
        ours.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is None or other.grad is None:
            continue
        assert type(one.grad) is type(other.grad), name
        one, other = one.grad, other.grad
        if hasattr(one, "placements"):
            assert one.placements == other.placements, name
            one, other = one.full_tensor(), other.full_tensor()
        assert (one - other).norm() <= most * other.norm(), name


def check_head(ranks: Ranks, bias: bool, sequence_parallel: bool) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import ColwiseParallel

    mesh, part = mesh_of(ranks), None
    if sequence_parallel:
        share = LENGTH // ranks.size
        part = slice(ranks.rank * share, ranks.rank * share + share)
    models = [
        make(
            mesh,
            ColwiseParallel(
                input_layouts=Shard(1) if sequence_parallel else Replicate(),
                output_layouts=Replicate(),
            ),
            bias=bias,
            part=part,
        )
        for _ in range(2)
    ]
    report = memeff.patch(models[0], strict=True)
    losses: list[Tensor] = []
    for model in models:
        model(ids_of())  # the first call looks at what the head returns
        communication: Any = CommDebugMode()
        with communication:
            loss = model(ids_of())
        if model is models[0]:
            gathered = communication.get_comm_counts()
            of_hidden = 1 if sequence_parallel else 0
            assert gathered[torch.ops.c10d_functional.all_gather_into_tensor] == of_hidden
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1])
    assert all(torch.equal(loss, losses[0]) for loss in ranks.gather(losses[0]))
    assert isinstance(models[0].head.weight, DTensor)
    compare_gradients(*models)
    assert not report.left_dense and not report.materialised, str(report)
    assert report.without_logits["cross_entropy"] == 2
    assert "plain logits under torch.compile: head" in str(report)


def check_functions(ranks: Ranks) -> None:
    """What else code asks of logits, with gradients; and the logits themselves."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel

    mesh = mesh_of(ranks)
    models = [make(mesh, ColwiseParallel(output_layouts=Replicate())) for _ in range(2)]
    report = memeff.patch(models[0])
    ids = ids_of()
    functions: dict[str, Callable[[Any], Tensor]] = {
        "logsumexp": lambda z: z.logsumexp(-1),
        "logprobs": lambda z: torch.log_softmax(z, -1).gather(-1, ids.unsqueeze(-1)),
        "entropy": lambda z: -(torch.softmax(z, -1) * torch.log_softmax(z, -1)).sum(-1),
        "mean": lambda z: z.mean(-1),
        "scaled and capped": lambda z: (5 * torch.tanh(z / 3 / 5)).logsumexp(-1),
        "topk": lambda z: z.topk(5).values,
        "dense": lambda z: (z.dense() if hasattr(z, "dense") else z).square(),
    }
    for name, function in functions.items():
        found = []
        for model in models:
            model.zero_grad()
            value = function(model.logits(ids))
            weights = torch.linspace(0.5, 2, value.numel()).reshape(value.shape)
            (value * weights).sum().backward()
            found.append(value.detach())
        torch.testing.assert_close(*found, msg=name)
        compare_gradients(*models, most=1e-5)
    with torch.no_grad():
        ours, plain = (model.logits(ids) for model in models)
        assert torch.equal(ours.argmax(-1), plain.argmax(-1))
        assert torch.equal(ours.topk(4).indices, plain.topk(4).indices)
        torch.testing.assert_close(ours.dense(), plain)
    assert set(report.materialised) == {"dense"}, str(report)


def check_plain(ranks: Ranks) -> None:
    """Where logits stay sharded, they are the plain ones, and the report says why."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel

    mesh, ids = mesh_of(ranks), ids_of()
    for options, why in (
        ({"output_layouts": Shard(-1), "use_local_output": False}, "its logits are a DTensor"),
        ({"output_layouts": Replicate(), "use_local_output": False}, "its logits are a DTensor"),
        ({"output_layouts": Shard(-1)}, f"of {VOCAB} logits"),
    ):
        models = [make(mesh, ColwiseParallel(**options)) for _ in range(2)]
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            report = memeff.patch(models[0])
            ours, plain = (model.logits(ids) for model in models)
        assert why in report.left_dense["head"], str(report)
        assert type(ours) is type(plain)
        if hasattr(ours, "to_local"):
            ours, plain = ours.to_local(), plain.to_local()
        assert torch.equal(ours, plain)
    model = make(mesh, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memeff.patch(model)
        with loss_parallel():
            F.cross_entropy(model.logits(ids).flatten(0, 1), ids.flatten()).backward()


def check_order(ranks: Ranks) -> None:
    """Patched before it is parallelised, it is plain; unpatched, it is what it was."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh, ids = mesh_of(ranks), ids_of()
    style = ColwiseParallel(output_layouts=Replicate())
    torch.manual_seed(3)
    model = Model()
    report = memeff.patch(model)
    parallelize_module(model, mesh, {"head": style})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = model.logits(ids)
    assert "call memeff.patch after parallelize_module" in report.left_dense["head"]
    memeff.unpatch(model)
    assert type(model.head) is nn.Linear and not hasattr(model.head, "memeff_report")
    memeff.patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(model.logits(ids).dense(), before)
    stale = model.logits(ids)
    with torch.no_grad():
        model.head.weight.mul_(2)
    message = raised(lambda: stale.logsumexp(-1))
    assert "the weight of a head was modified in place" in message, message
    memeff.unpatch(model)
    assert type(model.head) is nn.Linear and "memeff_layouts" not in model.head.__dict__


def check_fsdp(ranks: Ranks) -> None:
    """FSDP2 over one dimension of a mesh, tensor parallelism over the other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel

    mesh: Any = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    ids = ids_of(mesh.get_local_rank("dp"))
    for outside in (False, True):
        models, losses = [], []
        for patched in (True, False):
            model = make(mesh["tp"], ColwiseParallel(output_layouts=Replicate()))
            fully_shard(model.down, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
            if patched:
                report = memeff.patch(model, strict=True)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                model.outside = outside
                loss = loss_of(model(ids), ids) if outside else model(ids)
                loss.backward()
                optimizer.step()
            models.append(model)
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
        compare_gradients(*models)
        assert not report.left_dense and report.without_logits["cross_entropy"] == 2, str(report)


@contextmanager
def saved_llama(ranks: Ranks) -> Iterator[str]:
    """A folder with a tiny model, on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folders: list[Any] = [None]
    if ranks.rank == 0:
        folders = [tempfile.mkdtemp()]
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=VOCAB + 1, hidden_size=FEATURES, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folders[0])
    dist.broadcast_object_list(folders, src=0, group=ranks.group)
    yield folders[0]
    ranks.gather(None)
    if ranks.rank == 0:
        shutil.rmtree(folders[0])


def check_transformers(ranks: Ranks, fsdp: str | None = None) -> None:
    """Its own tensor-parallel plan, which gathers the logits; alone, or with FSDP2 over another
    dimension of the mesh, whose ranks have sequences of their own and average gradients. The head
    is in the "root" unit, or by transformers' plan in one of its "own", which has plain logits."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    options: dict[str, Any] = {"tp_plan": "auto"}
    if fsdp is not None:
        distributed = DistributedConfig(tp_plan="auto", tp_size=ranks.size // 2, fsdp_size=2)
        options = {"distributed_config": distributed}
    plan = {} if fsdp == "root" else LlamaForCausalLM._fsdp_plan
    with saved_llama(ranks) as folder, mock.patch.object(LlamaForCausalLM, "_fsdp_plan", plan):
        whole = AutoModelForCausalLM.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    data, parts = (ranks.rank // (ranks.size // 2), 2) if fsdp else (0, 1)
    losses = [whole(input_ids=ids_of(part), labels=ids_of(part)).loss for part in range(parts)]
    torch.stack(losses).mean().backward()
    report = memeff.patch(model, strict=fsdp != "own")
    loss = model(input_ids=ids_of(data), labels=ids_of(data)).loss
    loss.backward()
    torch.testing.assert_close(loss, losses[data])
    for (name, one), (_, other) in zip(
        model.named_parameters(), whole.named_parameters(), strict=True
    ):
        gradient: Any = one.grad
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        assert other.grad is not None
        assert (gradient - other.grad).norm() <= 1e-5 * other.grad.norm(), name
    assert hasattr(model.lm_head.weight, "full_tensor"), "the head is not sharded"
    if fsdp == "own":
        assert "FSDP shards it as a unit of its own" in report.left_dense["lm_head"]
    else:
        assert not report.left_dense and report.without_logits["cross_entropy"] == 1, str(report)


def check_documentation(ranks: Ranks) -> None:
    """The snippets of docs/distributed.md, one after the other."""
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    snippet = re.compile(r"^<!-- needs: ranks -->\n```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
    codes = snippet.findall(page.read_text())
    assert len(codes) == 3
    names: dict[str, Any] = {}
    for code in codes:
        exec(compile(code, str(page), "exec"), names)
    for name in ("my_hidden", "weight", "hidden", "my_rows"):
        assert names[name].grad.isfinite().all(), name
    assert names["report"].without_logits["cross_entropy"] == 1, str(names["report"])
    assert not names["report"].materialised and not names["report"].left_dense


for _bias in (False, True):
    for _sequence_parallel in (False, True):
        add(f"head-{_bias}-{_sequence_parallel}", 2, check_head, _bias, _sequence_parallel)
add("head-functions", 3, check_functions)
add("head-plain", 2, check_plain)
add("head-order", 2, check_order)
add("head-fsdp", 4, check_fsdp)
if importlib.util.find_spec("transformers") is not None:
    add("head-transformers", 4, check_transformers)
    add("head-transformers-fsdp", 4, check_transformers, "root")
    add("head-transformers-fsdp-own", 4, check_transformers, "own")
add("documentation", 4, check_documentation)
