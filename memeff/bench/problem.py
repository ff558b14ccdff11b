"""The inputs that every variant is given."""

from dataclasses import dataclass

import torch

from memeff.bench.shapes import Shape

DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# Logits of trained language models spread over a few units; a spread of 1 would make softmax nearly
# flat.
_LOGIT_SPREAD = 3.0
# What `peaked` adds to the logit of the target. Over 131072 classes the others amount to e^16, so
# the target's probability is 1 - 1e-6.
_PEAK = 30.0


@dataclass
class Problem:
    """Inputs of one measurement.

    x: [N, D] hidden states; w: [V, D] classifier, both `dtype`; y: [N] int64 in [0, V).
    No token is ignored: a variant that skips ignored tokens would beat the GEMM floor unfairly.
    """

    shape: Shape
    x: torch.Tensor
    w: torch.Tensor
    y: torch.Tensor
    softcap: float | None

    def clear_gradients(self) -> None:
        self.x.grad = None
        self.w.grad = None


def make_problem(
    shape: Shape,
    dtype: torch.dtype,
    *,
    softcap: float | None = None,
    requires_grad: bool = True,
    device: str = "cpu",
    peaked: bool = False,
    seed: int = 0,
) -> Problem:
    """Random inputs: x ~ N(0, 1) and w ~ N(0, 9/D), so logits ~ N(0, 9); uniform targets. `peaked`
    moves x towards the weights of its target, whose logit is then larger by 30, as where a trained
    model is sure.
    """
    generator = torch.Generator(device).manual_seed(seed)
    # Filled in place, in the final type: a float32 copy of a large head would leave its mark on
    # peak memory.
    x = torch.empty(shape.tokens, shape.features, dtype=dtype, device=device).normal_(
        generator=generator
    )
    w = torch.empty(shape.vocab, shape.features, dtype=dtype, device=device)
    w.normal_(std=_LOGIT_SPREAD / shape.features**0.5, generator=generator)
    y = torch.randint(shape.vocab, (shape.tokens,), generator=generator, device=device)
    if peaked:
        for start in range(0, shape.tokens, 1024):
            part = slice(start, start + 1024)
            rows = w[y[part]].double()
            x[part] += (_PEAK * rows / rows.square().sum(1, keepdim=True)).to(dtype)
    return Problem(
        shape, x.requires_grad_(requires_grad), w.requires_grad_(requires_grad), y, softcap
    )
