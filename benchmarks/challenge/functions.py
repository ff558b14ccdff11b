"""The user's functions, as the challenge writes them, and the problem that they are tried on."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
    logits = linear(hidden).float()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))


def focal(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
    log_p = linear(hidden).float().log_softmax(-1).gather(-1, labels[:, None])
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


def squared_error(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
    logits = linear(hidden).float()
    return (logits - F.one_hot(labels, logits.shape[-1])).square().mean(-1).mean()


def smoothed(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(linear(hidden).float(), labels, label_smoothing=0.1)


def divergence(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
    """KL from a Zipf distribution over the classes, rotated by the label."""
    log_p = linear(hidden).float().log_softmax(-1)
    vocab = log_p.shape[-1]
    ranks = (torch.arange(vocab, device=labels.device) + labels[:, None]) % vocab + 1
    q = (1 / ranks.float()).softmax(-1)
    return F.kl_div(log_p, q, reduction="none").sum(-1).mean()


def random_function(seed: int) -> Callable[[Tensor, Any, Tensor], Tensor]:
    """A random composition of differentiable operations, unknown to the library."""
    rng = random.Random(seed)
    steps: list[Callable[[Tensor], Tensor]] = [
        torch.tanh, torch.sin, F.softplus, torch.atan, lambda t: t.log_softmax(-1),
        lambda t: t * t.sigmoid(), lambda t: t - t.mean(-1, keepdim=True),
    ]  # fmt: skip
    chosen = [(rng.choice(steps), rng.uniform(-2, 2)) for _ in range(4)]

    def function(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
        z = linear(hidden).float()
        total = torch.zeros_like(z)
        for step, weight in chosen:
            z = step(z)
            total = total + weight * z
        return (total * (labels[:, None] % 7 + 1)).square().mean(-1).mean()

    return function


class Problem:
    def __init__(self, shape: list[int], bias: bool = True, device: str = "cpu") -> None:
        tokens, features, vocab = shape
        torch.manual_seed(0)
        self.x = torch.randn(tokens, features, device=device).bfloat16().requires_grad_()
        self.linear = torch.nn.Linear(features, vocab, bias=bias, device=device)
        torch.nn.init.normal_(self.linear.weight, std=2 / features**0.5)
        self.linear = self.linear.bfloat16()
        self.labels = torch.randint(vocab, (tokens,), device=device)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *self.linear.parameters()]
