"""TRL: memeff under the fused head of its trainers. Tested with TRL 1.16.0.

TRL's trainers for SFT, DPO, KTO, GRPO and RLOO call no head. They ask one autograd.Function,
``trl.trainer.utils._ChunkedLogProbFunction``, for what their losses need of the logits:

    log p_y     log-probability of the target              differentiable
    H           entropy -sum_v p_v log p_v                 differentiable
    log sum_v p_v^2,  mean_v z_v,  argmax_v z_v == y       only numbers

with z = cap(logit_scale * (hidden W^T + b)) / temperature, p = softmax(z), and `patch` puts
`memeff.linear_token_statistics` in its place. The losses stay TRL's own. The trainers of
``trl.experimental`` that ask the model for logits (ORPO, CPO, ...) want ``memeff.patch(model)``.
"""

from __future__ import annotations

import inspect
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from memeff.token_statistics import linear_token_statistics

__all__ = ["patch", "unpatch"]

_TESTED = "1.16.0"
_NAME = "_ChunkedLogProbFunction"
# What the function gets and may be asked for, in the order in which it returns these.
_PARAMETERS = (
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
    "logit_scale", "outputs",
)  # fmt: skip
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

PerToken = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def patch() -> None:
    """Let the fused head of TRL's trainers compute with memeff, before or after one is made.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this version of TRL has no such function, or one with other arguments or
            other results than in the versions that this was tested with.
    """
    utils = _utils()
    original = getattr(utils, _NAME, None)
    if original is _LogProbs:
        return
    _check(original)
    _LogProbs.original = original
    setattr(utils, _NAME, _LogProbs)


def unpatch() -> None:
    """Undo `patch`; without it this does nothing."""
    utils = _utils()
    if getattr(utils, _NAME, None) is _LogProbs:
        setattr(utils, _NAME, _LogProbs.original)


def _utils() -> ModuleType:
    try:
        import trl.trainer.utils
    except ImportError as error:
        raise ImportError(
            f"memeff.integrations.trl needs TRL, which cannot be imported ({error}); install it "
            "with: pip install trl"
        ) from error
    utils: ModuleType = trl.trainer.utils
    return utils


class _LogProbs:
    """In place of TRL's autograd.Function, of which only ``apply`` is called."""

    original: Any

    @staticmethod
    def apply(
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N], each in [0, V)
        temperature: float,
        chunk_size: int,  # memeff plans its own
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OUTPUTS,
    ) -> PerToken:
        """[N] of each of: log p_y, H, log sum p^2, mean z, y is top 1; None if not in outputs."""
        if hasattr(weight, "ds_id"):
            # ZeRO-3 frees the weight after this call; only TRL's own backward gathers it again.
            warnings.warn(
                "under DeepSpeed ZeRO-3 TRL's fused head runs without memeff", stacklevel=2
            )
            result: PerToken = _LogProbs.original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping,
                logit_scale, outputs,
            )  # fmt: skip
            return result
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        # c tanh(s u / c) / T = (c / T) tanh((s / T) u / (c / T))
        scale = logit_scale / temperature
        softcap = None if final_logit_softcapping is None else final_logit_softcapping / temperature
        found = linear_token_statistics(
            hidden,
            weight,
            targets,
            linear_bias=bias,
            softcap=softcap,
            logit_scale=scale,
            entropy="entropy" in outputs,
            argmax="is_top1" in outputs,
            logit_sum="mean_logits" in outputs,
            log_sum_sq_probs="log_sum_sq_probs" in outputs,
        )
        assert found.logprob is not None
        return (
            found.logprob,
            found.entropy,
            _number(found.log_sum_sq_probs),
            _number(found.mean_logit),
            None if found.argmax is None else found.argmax == targets,
        )


def _number(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()


def _check(original: Any) -> None:
    """Raise RuntimeError unless TRL's function has the arguments and results expected here."""
    import trl

    def fail(what: str) -> None:
        raise RuntimeError(
            f"memeff.integrations.trl was tested with TRL {_TESTED}; in the installed "
            f"{trl.__version__} trl.trainer.utils.{_NAME} {what}. Install trl=={_TESTED}, or a "
            "newer memeff"
        )

    if original is None:
        fail("does not exist")
    parameters = tuple(inspect.signature(original.forward).parameters)[1:]
    if parameters != _PARAMETERS:
        fail(f"takes {parameters}, expected {_PARAMETERS}")
    generator = torch.Generator("cpu").manual_seed(0)
    hidden, weight = (
        torch.randn(rows, 4, generator=generator, dtype=torch.float32, device="cpu")
        for rows in (3, 7)
    )
    targets = torch.tensor([0, 3, 6], device="cpu")
    arguments = (hidden, weight, weight[:, 0], targets, 0.7, 5, 2.0, 1.5, ("log_probs", *_OUTPUTS))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        theirs, ours = original.apply(*arguments), _LogProbs.apply(*arguments)
    for name, value, expected in zip(("log_probs", *_OUTPUTS), ours, theirs, strict=True):
        assert value is not None
        if not torch.allclose(value.float(), expected.float(), rtol=1e-4, atol=1e-4):
            fail(f"has other results than before ({name})")
