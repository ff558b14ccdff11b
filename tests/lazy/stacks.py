"""A tiny language model under DDP, FSDP and ZeRO: two processes of this file, patched and plain.

    python tests/lazy/stacks.py torch              every case of a launch, one line each
    python tests/lazy/stacks.py "" "DDP, tied, loss inside"      one of them
    python tests/lazy/stacks.py --write            the table of docs/integrations.md

`compare` trains one model with the plain head and one with the lazy head under the same stack,
each process on its own tokens, and returns how far apart they end. Where a stack rounds to bf16
both are compared with the same stack in float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # processes.py

import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import join, run_processes
from torch import Tensor, nn

import memeff

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
BEGIN, END = "<!-- stacks: begin -->", "<!-- stacks: end -->"
PROCESSES = 2
VOCAB, FEATURES, BATCH, LENGTH, STEPS = 67, 24, 4, 9, 3  # an odd vocabulary: uneven shards


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, 2 * FEATURES)
        self.down = nn.Linear(2 * FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


class Model(nn.Module):
    """Returns logits, or the next-token loss where it gets labels."""

    def __init__(self, tied: bool, bias: bool, unused: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, FEATURES)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(FEATURES)
        self.head = nn.Linear(FEATURES, VOCAB, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight
        if unused:
            self.unused = nn.Linear(3, 3)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits if labels is None else loss_of(logits, labels)


def loss_of(logits: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].float().reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


@dataclasses.dataclass(frozen=True)
class Case:
    """How to wrap a model and to train it. `units`: which modules FSDP makes units of their own."""

    stack: Callable[..., Stack]
    outside: bool = False  # whether the loss is computed outside of the model's forward
    tied: bool = False
    bias: bool = False
    unused: bool = False
    bf16: bool = False
    accumulate: int = 1
    patch_wrapped: bool = False  # memeff.patch after the wrapping, not before
    units: tuple[str, ...] = ("blocks",)
    root_reshards: bool | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the wrapper


@dataclasses.dataclass
class Outcome:
    """`losses` of all steps, `gradients` of the first one, `parameters` after the last one."""

    losses: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    argmax: list[int]
    dtypes: list[str]


class Stack:
    """A wrapped model; subclasses wrap it, and know how gradients and parameters become whole."""

    def __init__(self, model: Model, case: Case) -> None:
        self.case = case
        self.model = self.wrap(model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.3, momentum=0.9)

    def wrap(self, model: Model) -> Any:
        raise NotImplementedError

    def accumulating(self) -> Any:
        """The context of a micro-batch that is not the last one: no gradients are reduced."""
        return self.model.no_sync()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        return {
            name: whole(parameter.grad)
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }

    def parameters(self) -> dict[str, Tensor]:
        return {name: whole(parameter) for name, parameter in self.model.named_parameters()}

    def loss(self, ids: Tensor) -> tuple[Tensor, list[str]]:
        """The loss, and the dtypes that code sees."""
        if not self.case.outside:
            loss = self.model(ids, ids)
            return loss, [str(loss.dtype)]
        logits = self.model(ids)
        loss = loss_of(logits, ids)
        return loss, [str(logits.dtype), str(loss.dtype)]

    def train(self) -> Outcome:
        generator = torch.Generator().manual_seed(7 + dist.get_rank())
        outcome = Outcome([], {}, {}, [], [])
        count = self.case.accumulate
        ids = torch.empty(0)
        for step in range(STEPS):
            for i in range(count):
                ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
                with contextlib.nullcontext() if i == count - 1 else self.accumulating():
                    loss, outcome.dtypes = self.loss(ids)
                    self.backward(loss)
                outcome.losses.append(loss.item())
            if step == 0:
                outcome.gradients = self.gradients()
            self.step()
        self.model.eval()
        with torch.no_grad():
            logits = self.model(ids)
            outcome.losses.append(loss_of(logits, ids).item())
            outcome.argmax = logits.argmax(-1).flatten().tolist()
        outcome.parameters = self.parameters()
        return outcome


def whole(tensor: Any) -> Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().float().clone()


class DDP(Stack):
    def wrap(self, model: Model) -> Any:
        return nn.parallel.DistributedDataParallel(model, **self.case.options)

    def loss(self, ids: Tensor) -> tuple[Tensor, list[str]]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.case.bf16):
            return super().loss(ids)


class FSDP1(Stack):
    def wrap(self, model: Model) -> Any:
        from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
        from torch.distributed.fsdp.wrap import CustomPolicy

        self.kind = FullyShardedDataParallel
        units = [*model.blocks] if "blocks" in self.case.units else []
        if "head" in self.case.units:
            units.append(model.head)
        options = dict(self.case.options)
        if self.case.bf16:
            options["mixed_precision"] = MixedPrecision(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=CustomPolicy(lambda module: module in units),
            device_id=torch.device("cpu"),
            use_orig_params=True,
            **options,
        )

    def gradients(self) -> dict[str, Tensor]:
        with self.kind.summon_full_params(self.model, with_grads=True):
            return super().gradients()

    def parameters(self) -> dict[str, Tensor]:
        with self.kind.summon_full_params(self.model):
            return super().parameters()


class FSDP2(Stack):
    def wrap(self, model: Model) -> Any:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        options = dict(self.case.options)
        if self.case.bf16:
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, **options.pop("policy", {})
            )
        options.pop("policy", None)
        for unit in self.case.units:
            if unit == "blocks":
                for block in model.blocks:
                    fully_shard(block, **options)
            else:
                modules = [getattr(model, name) for name in unit.split("+")]
                fully_shard(modules if len(modules) > 1 else modules[0], **options)
        if self.case.root_reshards is not None:
            options["reshard_after_forward"] = self.case.root_reshards
        return fully_shard(model, **options)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        self.model.set_requires_gradient_sync(False)
        yield
        self.model.set_requires_gradient_sync(True)


class ZeRO(Stack):
    def wrap(self, model: Model) -> Any:
        import deepspeed

        # Its own kernels in place of gloo's would be compiled first, which takes minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config = {
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_accumulation_steps": self.case.accumulate,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": self.case.bf16},
            # Without the threshold small parameters are not sharded.
            "zero_optimization": {"stage3_param_persistence_threshold": 0, **self.case.options},
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        return engine

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        yield
        self.model.step()  # counts the micro-batch, no more

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def step(self) -> None:
        self.model.step()

    def gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        return {n: whole(safe_get_full_grad(p)) for n, p in self.model.named_parameters()}

    def parameters(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {n: whole(safe_get_full_fp32_param(p)) for n, p in self.model.named_parameters()}


def _cases() -> Iterator[tuple[str, Case]]:
    """The loss is in both places where a wrapper may free what a head needs, else in the model."""
    both: dict[str, Any]
    for outside in (False, True):
        where = "loss outside" if outside else "loss inside"
        both = {"outside": outside}
        for stack in (DDP, FSDP1, FSDP2):
            name = stack.__name__
            yield f"{name}, {where}", Case(stack, **both)
            yield f"{name}, tied, {where}", Case(stack, tied=True, **both)
            yield f"{name}, bf16, {where}", Case(stack, bf16=True, **both)
        for stack in (FSDP1, FSDP2):
            name = stack.__name__
            case = Case(stack, bias=True, units=("blocks", "head"), **both)
            yield f"{name}, head is a unit, {where}", case
            yield f"{name}, head is a unit, bf16, {where}", dataclasses.replace(case, bf16=True)
            yield f"{name}, one unit, {where}", Case(stack, units=(), **both)
        for reshards in (False, True):
            what = "reshards" if reshards else "does not reshard"
            case = Case(FSDP2, root_reshards=reshards, **both)
            yield f"FSDP2, root {what}, {where}", case
            yield f"FSDP2, root {what}, tied, {where}", dataclasses.replace(case, tied=True)
            yield f"FSDP2, one unit, {what}, {where}", dataclasses.replace(case, units=())
        case = Case(FSDP2, units=("blocks", "norm+head"), **both)
        yield f"FSDP2, norm and head are a unit, {where}", case
        policy = {"policy": {"output_dtype": torch.float32}}
        case = Case(FSDP2, bf16=True, units=(), options=policy, **both)
        yield f"FSDP2, bf16 with fp32 outputs, {where}", case
    for stack in (DDP, FSDP1, FSDP2):
        name = stack.__name__
        yield f"{name}, accumulation", Case(stack, bias=True, accumulate=2)
        yield f"{name}, patched when wrapped", Case(stack, patch_wrapped=True)
    for option in ("static_graph", "find_unused_parameters", "gradient_as_bucket_view"):
        unused = option == "find_unused_parameters"
        yield f"DDP, {option}", Case(DDP, bias=True, unused=unused, options={option: True})
    for stage in (1, 2, 3):
        for outside in (False, True):
            where = "loss outside" if outside else "loss inside"
            both = {"outside": outside, "options": {"stage": stage}}
            yield f"ZeRO-{stage}, {where}", Case(ZeRO, **both)
        both["outside"] = stage == 2
        yield f"ZeRO-{stage}, accumulation", Case(ZeRO, accumulate=2, **both)
        yield f"ZeRO-{stage}, tied", Case(ZeRO, tied=True, **both)
        yield f"ZeRO-{stage}, bf16", Case(ZeRO, bf16=True, **both)
        yield f"ZeRO-{stage}, patched when wrapped", Case(ZeRO, patch_wrapped=True, **both)


CASES = dict(_cases())
# Two processes of one launch import torch, or DeepSpeed as well, once for all of its cases.
LAUNCHES = {
    "torch": [name for name, case in CASES.items() if case.stack is not ZeRO],
    "deepspeed": [name for name, case in CASES.items() if case.stack is ZeRO],
}


# Where a stack cannot run a head twice, it stays plain, and says so.
DENSE = {name for name in CASES if name.startswith("FSDP1, head is a unit, bf16")}


def table() -> str:
    """CASES for docs/integrations.md, a row per stack."""
    rows: dict[str, list[str]] = {}
    for name in CASES:
        stack, *what = name.split(", ")
        *kind, _where = what if what[-1].startswith("loss") else [*what, ""]
        label = ", ".join(kind) or "default"
        if name in DENSE:
            label += " (plain logits)"
        row = rows.setdefault(stack, [])
        if label not in row:
            row.append(label)
    lines = ["| stack | tested |", "| --- | --- |"]
    lines += [f"| {stack} | {'; '.join(labels)} |" for stack, labels in rows.items()]
    return "\n".join(lines)


def compare(case: Case) -> dict[str, Any]:
    """Distances of the lazy head's outcome from the plain head's, `plain_*` for those of the plain
    one from float32, and the report of memeff.patch."""
    outcomes = {}
    for kind in ("plain", "lazy", "exact") if case.bf16 else ("plain", "lazy"):
        torch.manual_seed(11)
        model = Model(case.tied, case.bias, case.unused)
        used = dataclasses.replace(case, bf16=False) if kind == "exact" else case
        if kind == "lazy" and not case.patch_wrapped:
            report = memeff.patch(model, strict=True)
        stack = used.stack(model, used)
        if kind == "lazy" and case.patch_wrapped:
            report = memeff.patch(stack.model, strict=True)
        outcomes[kind] = stack.train()
    lazy, plain = outcomes["lazy"], outcomes["plain"]
    reference = outcomes.get("exact", plain)
    result = distances(lazy, reference, each=not case.bf16)
    if case.bf16:
        rounding = distances(plain, reference, each=False)
        result |= {f"plain_{name}": value for name, value in rounding.items()}
    differ = sum(a != b for a, b in zip(lazy.argmax, plain.argmax, strict=True))
    return {
        **result,
        "argmax": differ / len(plain.argmax),
        "dtypes": [lazy.dtypes, plain.dtypes],
        "without_logits": dict(report.without_logits),
        "left_dense": report.left_dense,
        "materialised": list(report.materialised),
    }


def distances(ours: Outcome, theirs: Outcome, each: bool) -> dict[str, float]:
    """Relative distances: of each number or tensor, the largest, or of all together."""
    pairs = zip(ours.losses, theirs.losses, strict=True)
    return {
        "losses": max(abs(a - b) / abs(b) for a, b in pairs),
        "gradients": _distance(ours.gradients, theirs.gradients, each),
        "parameters": _distance(ours.parameters, theirs.parameters, each),
    }


def _distance(ours: dict[str, Tensor], theirs: dict[str, Tensor], each: bool) -> float:
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    differences = torch.stack([(ours[name] - tensor).norm() for name, tensor in theirs.items()])
    norms = torch.stack([tensor.norm() for tensor in theirs.values()])
    if not each:
        differences, norms = differences.norm(), norms.norm()
    return float((differences / norms.clamp(min=1e-30)).max())


def launch(names: list[str], timeout: float) -> dict[str, dict[str, Any]]:
    """Run cases in PROCESSES processes: name -> what `compare` returned, or {"error": traceback}.

    A case that did not end in time, and those after it, are missing.
    """
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        (folder / "names").write_text(json.dumps(names))
        logs = run_processes(Path(__file__), PROCESSES, folder, timeout)
        results: dict[str, dict[str, Any]] = {}
        for rank, log in enumerate(logs):
            lines = folder / f"{rank}.jsonl"
            for line in lines.read_text().splitlines() if lines.exists() else ():
                name, result = json.loads(line)
                if "error" not in results.get(name, ()):  # of any process
                    results[name] = result
            if not lines.exists():
                print(log[-3000:])
        return results


def _process() -> None:
    """One of the processes."""
    folder, rank, _ = join(60)
    with open(folder / f"{rank}.jsonl", "w") as file:
        for name in json.loads((folder / "names").read_text()):
            try:
                result = compare(CASES[name])
            except Exception:
                result = {"error": traceback.format_exc()}
            print(json.dumps([name, result]), file=file, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[2].isdigit():  # folder, rank, number of processes
        _process()
    elif sys.argv[1] == "--write":
        text = PAGE.read_text()
        before, rest = text.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}")
    else:
        begin = time.monotonic()
        for name, result in launch(sys.argv[2:] or LAUNCHES[sys.argv[1]], 600).items():
            print(name, result.get("error") or result)
        print(f"{time.monotonic() - begin:.0f} s")
