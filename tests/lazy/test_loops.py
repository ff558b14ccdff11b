"""Training loops of other packages, and one written by hand, around a patched model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memeff
from memeff.lazy.report import Report

VOCAB, FEATURES, STEPS = 83, 24, 4


class Model(nn.Module):
    """Tokens [B, T] -> logits [B, T, V]; as a list of chunks along T if `chunks` is set."""

    def __init__(self, chunks: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, FEATURES)
        self.body = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.GELU(), nn.LayerNorm(FEATURES))
        self.head = nn.Linear(FEATURES, VOCAB, bias=False)
        self.chunks = chunks

    def forward(self, tokens: Tensor) -> Any:
        hidden = self.body(self.embedding(tokens))
        if self.chunks:
            return [self.head(part) for part in hidden.chunk(self.chunks, 1)]
        return self.head(hidden)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(VOCAB, (2, 13), generator=generator) for _ in range(STEPS)]


def loss_of(logits: Any, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))


def pair(**options: Any) -> tuple[Model, Model, Report]:
    """A patched model, a plain one, the report; any computation of logits is an error."""
    torch.manual_seed(0)
    plain = Model(**options)
    model = copy.deepcopy(plain)
    return model, plain, memeff.patch(model, strict=True)


def check_equal(model: nn.Module, plain: nn.Module, losses: list[Any], expected: list[Any]) -> None:
    assert len(losses) == len(expected) == STEPS
    assert [float(loss) for loss in losses] == pytest.approx([float(e) for e in expected], rel=1e-5)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_recipe_with_chunked_outputs() -> None:
    """As torchtune's recipes: a list of chunks of logits, upcast, their summed losses, accumulated
    gradients that are scaled by the number of tokens, clipping, AdamW."""
    model, plain, report = pair(chunks=3)
    losses: list[list[Tensor]] = []
    for m in (model, plain):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
        losses.append([])
        for tokens in batches():
            labels = torch.hstack([tokens[:, 1:], torch.full((2, 1), -100)])
            counted, total = (labels != -100).sum(), torch.zeros(())
            for half in range(2):  # micro-batches
                outputs = m(tokens[half : half + 1])
                parts = [
                    part.reshape(-1) for part in labels[half : half + 1].chunk(len(outputs), 1)
                ]
                flat = [chunk.reshape(-1, chunk.size(-1)) for chunk in outputs]
                loss = sum(
                    F.cross_entropy(chunk.float(), part, ignore_index=-100, reduction="sum")
                    for chunk, part in zip(flat, parts, strict=True)
                )
                loss.backward()
                total += loss.detach()
            for parameter in m.parameters():
                parameter.grad.mul_(1 / counted)
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[-1].append(total / counted)
    check_equal(model, plain, *losses)
    assert report.without_logits["cross_entropy"] == STEPS * 2 * 3


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str) -> None:
    """prepare() wraps forward: it converts what a model returns to float32 in mixed precision."""
    accelerate = pytest.importorskip("accelerate")
    model, plain, report = pair()
    losses: list[list[Tensor]] = []
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
    )
    for original in (model, plain):
        optimizer = torch.optim.SGD(original.parameters(), lr=0.1)
        m, optimizer, data = accelerator.prepare(
            original, optimizer, torch.utils.data.DataLoader(batches(), batch_size=None)
        )
        losses.append([])
        for tokens in data:
            with accelerator.accumulate(m):
                logits = m(tokens)
                assert logits.dtype == torch.float32
                loss = loss_of(logits, tokens)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(m.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses[-1].append(accelerator.gather(loss.detach()).mean())
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert report.without_logits["cross_entropy"] == STEPS and not report.materialised
    if precision == "no":
        check_equal(model, plain, *losses)
    else:  # of bfloat16
        assert [float(loss) for loss in losses[0]] == pytest.approx(
            [float(loss) for loss in losses[1]], rel=2**-7
        )


def test_lightning(tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):
        def __init__(self, model: Model) -> None:
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, tokens: Tensor, index: int) -> Tensor:
            loss = loss_of(self.model(tokens), tokens)
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model, plain, report = pair()
    tasks = [Task(model), Task(plain)]
    for task in tasks:
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            default_root_dir=tmp_path,
        )
        trainer.fit(task, torch.utils.data.DataLoader(batches(), batch_size=None))
    check_equal(model, plain, *[task.losses for task in tasks])
    assert report.without_logits["cross_entropy"] == STEPS
