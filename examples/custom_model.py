"""A model of your own, with a soft cap and a tied head: one line, and no logits.

Nothing in the model or in the training loop knows of memeff. What `report` lists as computed are
the lines that would still need logits: here none.
"""

import torch
import torch.nn.functional as F
from _compare import compare
from torch import nn

import memeff
from memeff.bench.corpus import Vocabulary, standard_library_text


class Model(nn.Module):
    """A recurrent language model; the head shares the embedding's weight, as many do."""

    def __init__(self, vocab: int, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, features)
        self.body = nn.GRU(features, features, batch_first=True)
        self.head = nn.Linear(features, vocab, bias=False)
        nn.init.normal_(self.embedding.weight, std=features**-0.5)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.body(self.embedding(tokens))
        logits = self.head(hidden)  # [B, T, V]
        return 30.0 * torch.tanh(logits / 30.0)


def main(
    patched: bool = True, vocab: int = 32768, steps: int = 10, batch: int = 8, length: int = 128
) -> list[float]:
    """Trains on Python's standard library; returns the loss of each step."""
    torch.manual_seed(0)
    text = standard_library_text(300_000)
    tokens = Vocabulary(text, vocab).encode(text)
    model = Model(vocab, 128)
    report = memeff.patch(model) if patched else None
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(tokens) - length, (batch,))
        windows = torch.stack([tokens[start : start + length] for start in starts.tolist()])
        logits = model(windows)
        loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if report is not None:
        print(report)
    return losses


if __name__ == "__main__":
    compare(main)
