"""Errors against a float64 reference which is itself computed in slices of the vocabulary."""

from dataclasses import dataclass

import torch

from memeff.bench.problem import Problem

_SLICE_BYTES = 256 * 2**20
_SAMPLED_ROWS = 512


@dataclass(frozen=True)
class Errors:
    """Relative errors: |loss - ref| / |ref|, and Frobenius norms ||g - ref|| / ||ref|| for the
    gradients (over sampled rows); None for gradients that were not computed.
    """

    loss: float
    dx: float | None
    dw: float | None


def _sample(count: int, generator: torch.Generator) -> torch.Tensor:
    if count <= _SAMPLED_ROWS:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:_SAMPLED_ROWS].sort().values


class Float64Reference:
    """Mean cross entropy of `problem` in float64, exact loss, gradients for a sample of rows.

    Every token's log-sum-exp needs one pass over the vocabulary (2 NDV in float64). The gradients
    dx_n = sum_v dz_nv w_v and dw_v = sum_n dz_nv x_n are then formed for up to 512 tokens and 512
    classes (half of these are targets of some token), which makes the reference about as cheap as
    its first pass.
    """

    def __init__(self, problem: Problem, gradients: bool):
        x, w = problem.x.detach().double(), problem.w.detach()
        y, softcap = problem.y, problem.softcap
        count, (vocab, features) = x.shape[0], w.shape
        width = max(1, _SLICE_BYTES // (8 * max(count, features)))
        generator = torch.Generator().manual_seed(0)

        def logits(
            tokens: torch.Tensor, classes: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """z [n, v] and its derivative with respect to the bare product (1 without soft-cap)."""
            z = tokens @ classes.double().T
            if softcap is None:
                return z, torch.ones((), dtype=torch.float64, device=x.device)
            tanh = torch.tanh(z / softcap)
            return softcap * tanh, 1 - tanh * tanh

        lse = x.new_full((count,), -torch.inf)
        for start in range(0, vocab, width):
            z, _ = logits(x, w[start : start + width])
            lse = torch.logaddexp(lse, torch.logsumexp(z, 1))
        rows = x.new_empty(count)
        for start in range(0, count, _SAMPLED_ROWS):
            part = slice(start, start + _SAMPLED_ROWS)
            product = (x[part] * w[y[part]].double()).sum(1)
            rows[part] = product if softcap is None else softcap * torch.tanh(product / softcap)
        self.loss = (lse - rows).mean().item()

        self.tokens = _sample(count, generator).to(x.device)
        half = _sample(vocab, generator).to(x.device)[: max(1, _SAMPLED_ROWS // 2)]
        self.classes = torch.cat([half, y[self.tokens][: _SAMPLED_ROWS // 2]]).unique()
        self.dx = x.new_zeros(len(self.tokens), features)
        self.dw = x.new_zeros(len(self.classes), features)
        if not gradients:
            return

        def dlogits(tokens: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
            z, slope = logits(x[tokens], w[classes])
            p = torch.exp(z - lse[tokens, None])
            p -= (y[tokens, None] == classes[None, :]).double()
            return p * slope / count

        everyone = torch.arange(count, device=x.device)
        for start in range(0, vocab, width):
            classes = torch.arange(start, min(vocab, start + width), device=x.device)
            self.dx += dlogits(self.tokens, classes) @ w[classes].double()
        self.dw = dlogits(everyone, self.classes).T @ x

    def errors(
        self, loss: torch.Tensor, dx: torch.Tensor | None, dw: torch.Tensor | None
    ) -> Errors:
        """Errors of a result: loss [], dx [N, D] and dw [V, D] (or None)."""
        return Errors(
            abs(loss.item() - self.loss) / abs(self.loss),
            None if dx is None else _relative(dx[self.tokens], self.dx),
            None if dw is None else _relative(dw[self.classes], self.dw),
        )


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()
