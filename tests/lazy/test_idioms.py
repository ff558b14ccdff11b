"""What real training code does to logits: right in every case, and lazy where it should be.

From the losses of transformers, the trainers of TRL, and hand-written loops. test_table.py has each
operation by itself.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lazy_cases import VOCAB, Comparison
from torch import Tensor, nn

V = VOCAB
B, T = 3, 5
_GENERATOR = torch.Generator().manual_seed(1)
Y = torch.randint(V, (B, T), generator=_GENERATOR)
Y[:, 0] = -100
MASK = torch.rand(B, T, generator=_GENERATOR) > 0.4
MASK[0, -1] = True
CLASSES = Y.clamp(min=0)


def ce(z: Any, y: Tensor = Y, **options: Any) -> Tensor:
    return F.cross_entropy(z.reshape(-1, V), y.reshape(-1), **options)


def shifted(z: Any) -> Tensor:
    logits = z.float()[..., :-1, :].contiguous()
    return F.cross_entropy(logits.view(-1, logits.size(-1)), Y[..., 1:].reshape(-1).to(z.device))


def shape_unpacked(z: Any) -> Tensor:
    batch, length, vocab = z.shape
    return F.cross_entropy(z.reshape(batch * length, vocab), Y.view(batch * length))


def tempered_in_place(z: Any) -> Tensor:
    logits = z * 1.0
    logits /= 0.7
    logits.div_(1.3)
    return ce(logits)


def masked_mean(z: Any) -> Tensor:
    losses = ce(z, reduction="none").view(B, T)
    return (losses * MASK).sum() / MASK.sum()


def nonzero_rows(z: Any) -> Tensor:
    rows = MASK.view(-1).nonzero().squeeze(-1)
    return F.cross_entropy(z.view(-1, V)[rows], CLASSES.view(-1)[rows])


def label_smoother(z: Any) -> Tensor:
    """transformers.trainer_pt_utils.LabelSmoother."""
    log_probs = -F.log_softmax(z[..., :-1, :].contiguous(), dim=-1)
    labels = Y[..., 1:].contiguous().unsqueeze(-1)
    padding = labels.eq(-100)
    nll = log_probs.gather(dim=-1, index=labels.clamp(min=0))
    smoothed = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll.masked_fill_(padding, 0.0)
    smoothed.masked_fill_(padding, 0.0)
    count = padding.numel() - padding.long().sum()
    return 0.9 * nll.sum() / count + 0.1 * smoothed.sum() / (count * log_probs.shape[-1])


def selected_by_logsumexp(z: Any) -> Tensor:
    """trl.trainer.utils.selective_log_softmax of float32."""
    picked = torch.gather(z, dim=-1, index=CLASSES.unsqueeze(-1)).squeeze(-1)
    return picked - torch.stack([torch.logsumexp(row, dim=-1) for row in z])


def selected_row_by_row(z: Any) -> Tensor:
    """The same of 16-bit logits."""
    return torch.stack(
        [
            F.log_softmax(row, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            for row, labels in zip(z, CLASSES, strict=True)
        ]
    )


def entropy(z: Any) -> Tensor:
    """trl.trainer.utils.entropy_from_logits."""
    flat = z.reshape(-1, z.shape[-1])
    parts = []
    for part in flat.split(4, dim=0):
        p = F.softmax(part, dim=-1)
        parts.append(torch.logsumexp(part, dim=-1) - torch.sum(p * part, dim=-1))
    return torch.cat(parts).reshape(z.shape[:-1])


def focal(z: Any) -> Tensor:
    losses = ce(z, CLASSES, reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


def with_z_loss(z: Any) -> Tensor:
    return ce(z) + 1e-3 * z.logsumexp(-1).pow(2).mean()


def chunked(z: Any) -> Tensor:
    pairs = zip(z.chunk(2, 1), Y.chunk(2, 1), strict=True)
    return sum((ce(part, y, reduction="sum") for part, y in pairs), torch.zeros(()))


def by_sequence(z: Any) -> Tensor:
    return torch.stack([F.cross_entropy(row, y) for row, y in zip(z, Y, strict=True)])


def by_token(z: Any) -> Tensor:
    losses = [
        F.cross_entropy(z[b, t], Y[b, t]) for b in range(B) for t in range(T) if Y[b, t] != -100
    ]
    return torch.stack(losses)


def accuracy_of_top(z: Any) -> Tensor:
    return (z.topk(3, -1).indices == Y.unsqueeze(-1)).any(-1)


def capped(z: Any) -> Tensor:
    logits = z / 5.0
    logits = torch.tanh(logits)
    return ce(logits * 5.0)


def own_soft_targets(z: Any) -> Tensor:
    """Probabilities that are constants here: no entropy's gradient."""
    with torch.no_grad():
        p = z.softmax(-1)
    return -(p * z.log_softmax(-1)).sum(-1)


def own_expectation(z: Any) -> Tensor:
    with torch.no_grad():
        p = z.softmax(-1)
    return torch.mul(z, p).sum(-1)


def output_of_a_dict(z: Any) -> Tensor:
    outputs = {"logits": z}
    loss = ce(outputs["logits"])
    del outputs["logits"]
    return loss


LAZY: list[Callable[[Any], Any]] = [
    shifted,
    shape_unpacked,
    tempered_in_place,
    masked_mean,
    nonzero_rows,
    label_smoother,
    selected_by_logsumexp,
    selected_row_by_row,
    entropy,
    focal,
    with_z_loss,
    chunked,
    by_sequence,
    by_token,
    accuracy_of_top,
    capped,
    output_of_a_dict,
    lambda z: z[..., -1, :].logsumexp(-1),
    lambda z: z[torch.arange(B), torch.tensor([1, 4, 3])].logsumexp(-1),  # the last of each
    lambda z: z[:, torch.tensor(-1)].argmax(-1),
    lambda z: F.cross_entropy(z[MASK], CLASSES[MASK]),
    lambda z: F.cross_entropy(z.view(-1, V)[MASK.view(-1)].float(), CLASSES[MASK]),
    lambda z: ce(z / 0.7),
    lambda z: ce(z.to(Y.device).cpu()),
    lambda z: ce(z.to(dtype=torch.float32, non_blocking=True)),
    lambda z: ce(z.type(torch.float32)),
    lambda z: torch.take_along_dim(z.log_softmax(-1), CLASSES.unsqueeze(-1), -1),
    lambda z: torch.take_along_dim(z.log_softmax(-1), CLASSES.unsqueeze(-1), dim=2).squeeze(-1),
    lambda z: nn.CrossEntropyLoss(reduction="sum")(z.reshape(-1, z.shape[-1]), Y.reshape(-1)),
    lambda z: nn.NLLLoss()(nn.LogSoftmax(-1)(z).view(-1, V), Y.view(-1)),
    lambda z: nn.Softmax(dim=-1)(z).gather(-1, CLASSES.unsqueeze(-1)),
    lambda z: (z.softmax(-1).max(-1).values, z.max(-1)[0] - z.logsumexp(-1)),
    lambda z: (z.argmax(-1) == Y, ce(z)),
    lambda z: ce(z.transpose(0, 1).contiguous(), Y.T.contiguous()),
    lambda z: F.cross_entropy(z[:1].squeeze(0), Y[0]),
    lambda z: ce(z[:, ::2], CLASSES[:, ::2]),
    lambda z: torch.exp(ce(z)),
]

DENSE: dict[str, Callable[[Any], Any]] = {
    "isnan": lambda z: (torch.isnan(z).any(), ce(z)),
    "Tensor.masked_fill": lambda z: ce(z.masked_fill(torch.arange(V) > 60, -1e4), CLASSES % 60),
    "Tensor.__getitem__": lambda z: (
        ce(z[..., :V], CLASSES) + z[:, -1, [3, 5]].log_softmax(-1).sum()
    ),
    "Tensor.clamp": lambda z: ce(z.clamp(-1, 1)),
    "Tensor.__truediv__": lambda z: ce(z / torch.full((B, T, 1), 0.7)),
    "kl_div": lambda z: F.kl_div(z.log_softmax(-1), (z.detach() / 2).softmax(-1), reduction="sum"),
    "Tensor.mul": own_soft_targets,
    "mul": own_expectation,
    "cat": lambda z: ce(torch.cat([z, z]), torch.cat([Y, Y])),
    "zeros_like": lambda z: F.binary_cross_entropy_with_logits(z, torch.zeros_like(z)),
    "Tensor.__gt__": lambda z: (z > z.gather(-1, CLASSES.unsqueeze(-1))).sum(-1),
}


@pytest.mark.parametrize("function", LAZY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_without_logits(function: Callable[[Any], Any], dtype: torch.dtype) -> None:
    Comparison((B, T), dtype=dtype).check(function)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.filterwarnings("ignore:.*computed the logits")
def test_computes_the_logits(name: str) -> None:
    """Right, in the report with file and line; an error under strict."""
    c = Comparison((B, T), strict=False)
    c.check(DENSE[name])
    assert c.report.materialised[name].where.startswith(__file__), str(c.report)
    strict = Comparison((B, T))
    with pytest.raises(RuntimeError, match=r"needs the logits.*strict"):
        DENSE[name](strict.lazy.head(strict.lazy.hidden))


def test_saved_logits() -> None:
    """torch.save of what evaluation keeps."""
    c = Comparison((B, T), strict=False)
    with torch.no_grad():
        lazy, plain = c.lazy.head(c.lazy.hidden), c.plain.head(c.plain.hidden)
    file = io.BytesIO()
    torch.save({"logits": lazy}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["logits"], plain)
