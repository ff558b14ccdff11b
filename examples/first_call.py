"""Train a language model's head twice, with logits and without: the losses are the same.

Hidden states stand in for the layers below; the head is an nn.Linear, as in most models.
"""

import torch
import torch.nn.functional as F

import memeff

BATCH, LENGTH, FEATURES, VOCAB = 4, 64, 64, 4000


def with_logits(hidden: torch.Tensor, head: torch.nn.Linear, tokens: torch.Tensor) -> torch.Tensor:
    logits = head(hidden[:, :-1])  # [B, T-1, V]: what memeff does without
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def without_logits(
    hidden: torch.Tensor, head: torch.nn.Linear, tokens: torch.Tensor
) -> torch.Tensor:
    return memeff.linear_cross_entropy(hidden, head.weight, tokens, shift=True)


def main(steps: int = 20, loss_of=without_logits) -> list[float]:
    """Trains for `steps` steps; returns the loss of each."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(VOCAB, FEATURES)  # in place of a whole model
    head = torch.nn.Linear(FEATURES, VOCAB, bias=False)
    optimizer = torch.optim.Adam([*embedding.parameters(), *head.parameters()], lr=1e-2)
    tokens = torch.randint(VOCAB, (BATCH, LENGTH))
    losses = []
    for _ in range(steps):
        loss = loss_of(embedding(tokens), head, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for step, (a, b) in enumerate(zip(main(loss_of=with_logits), main(), strict=True)):
        print(f"step {step:2}   with logits {a:.6f}   memeff {b:.6f}")
