"""``linear_cross_entropy``: checks and normalises its arguments, then calls the op row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from memeff import _rows, reference
from memeff._call import loss_call
from memeff.statistics import TokenStatistics

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from memeff._options import LossOptions, TorchOptions
    from memeff.vocab_parallel import VocabParallel

__all__ = ["linear_cross_entropy"]


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    token_weight: Tensor | None = ...,
    num_items: int | float | Tensor | None = ...,
    return_statistics: Literal[False] = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    token_weight: Tensor | None = ...,
    num_items: int | float | Tensor | None = ...,
    return_statistics: Literal[True],
    **options: Unpack[LossOptions],
) -> tuple[Tensor, TokenStatistics]: ...


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: TorchOptions | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    shift: bool | int = False,
    return_statistics: bool = False,
    memory_budget: int | str | None = None,
    chunk_size: int | None = None,
    accum_dtype: torch.dtype | None = None,
    skip_mass: float = 0.0,
    vocab_parallel: VocabParallel | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """Cross entropy of ``input @ linear_weight.T + linear_bias`` without storing those logits.

    Takes every call that `torch.nn.functional.linear_cross_entropy` takes and returns the
    same loss and gradients, with three differences: for 16-bit inputs the loss is float32; class
    weights may be float32 with 16-bit inputs; the mean of the z-loss divides by the number of
    counted tokens, also with class weights. `memeff.reference` is the definition in plain
    PyTorch.

    Args:
        input: hidden states [..., D] or [D], of any strides; bfloat16, float16, float32 or float64.
        linear_weight: classifier [V, D], or [V, d1, ..., dK, D] for K-dimensional losses (then
            d1 * ... * dK classifiers over the same rows); dtype of ``input``.
        target: class indices [..., d1, ..., dK] (int64 or int32), each in [0, V) or
            ``ignore_index``; or class probabilities [..., V, d1, ..., dK], floating.
        linear_bias: [V, d1, ..., dK], dtype of ``input``.
        weight: class weights [V], any floating dtype. The mean of a loss with class indices divides
            by the sum of the targets' weights, as in torch.
        reduction: "mean", "sum" or "none" (a loss per token, in the shape of index targets).
        ignore_index: tokens with this target cost nothing and have no gradient. None means -100,
            and is the only value allowed with class probabilities.
        label_smoothing: in [0, 1], the share of the target spread evenly over all classes.
        options: torch.nn.LinearCrossEntropyOptions, for torch's callers: its ``batch_chunk_size``
            and ``acc_dtype`` become ``chunk_size`` and ``accum_dtype``, and the planner takes care
            of the rest.
        softcap: c > 0 caps the logits: c * tanh(z / c), after ``logit_scale``.
        logit_scale: multiplies ``input @ linear_weight.T + linear_bias``: 1 / temperature. A
            number, or a tensor of shape () that may require grad; its value is read before the
            call computes, for which a GPU is waited for.
        z_loss: coefficient of logsumexp(logits)^2, added to each token's loss.
        token_weight: [..., d1, ..., dK], multiplies each token's loss; it does not change the
            denominator of the mean. With ``shift`` an entry belongs to the target at its position.
        num_items: with "mean", the denominator in place of the count (or of the sum of weights):
            a number or a tensor with one. For gradient accumulation over several calls. 0 counts as
            1, so that a batch in which nothing counts has the loss 0.
        shift: k > 0 compares input[..., t, :] with target[..., t + k] without copying hidden states
            (True: 1, next-token prediction); the last k positions have no target, and per-token
            results have k positions fewer.
        return_statistics: also return `memeff.TokenStatistics`, computed in the same pass.
        memory_budget: most bytes beyond the gradients, as int or like "64MiB", "1GB": workspace,
            and what torch's matrix products take where these are used.
        chunk_size: tokens per chunk, for those who want to fix what the planner chooses; at least 8
            where torch's matrix products compute the scores.
        accum_dtype: how the weight gradient is summed over chunks of tokens. torch.float32
            (torch.float64 for float64 inputs): in sums of that dtype. None: the same, or for 16-bit
            dtypes, where that is faster or a memory budget too small, in 16-bit sums that are 32
            times finer than bfloat16 (the plan calls them "compact"; GPUs sum the input's gradient
            in the same way).
        skip_mass: e > 0 lets the gradients leave out tiles of the softmax without much probability:
            less than e per token in all, so that the error of a token's input gradient is less than
            e * max_v ||linear_weight[v]|| times its share of the loss. Saves time on GPUs where the
            kernels can skip (16-bit inputs, sm_80 and newer); elsewhere nothing is left out.
        vocab_parallel: `memeff.VocabParallel` where the ranks of a process group share the
            vocabulary: what has a row or an entry per class is then this rank's shard, and V the
            classes of all ranks.
        backend: "cpu", "cuda", "reference" (plain PyTorch, stores the logits, any device), or
            "auto": the one that fits the tensors. Gradients for ``weight`` or for class
            probabilities exist only in the reference; "auto" takes it when those require grad.

    Returns:
        The loss, 0-d or per token, float32 (float64 for float64 inputs); with ``return_statistics``
        the pair (loss, statistics). Gradients have the dtype of what they belong to. A mean over no
        counted token is nan, as in torch. Second derivatives raise an error.

    Raises:
        TypeError, ValueError, RuntimeError: an argument of the wrong type, with a bad value, or
            whose rank, shape, dtype or device does not fit; before anything is computed.
        IndexError: a target outside [0, V) that is not ``ignore_index`` (on the CPU).
    """
    call = loss_call(
        input,
        linear_weight,
        target,
        linear_bias,
        weight,
        token_weight,
        num_items,
        options,
        return_statistics=return_statistics,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        logit_scale=logit_scale,
        z_loss=z_loss,
        shift=shift,
        memory_budget=memory_budget,
        chunk_size=chunk_size,
        accum_dtype=accum_dtype,
        skip_mass=skip_mass,
        vocab_parallel=vocab_parallel,
        backend=backend,
    )
    if call.needs_reference():
        return call.of_reference(reference.linear_cross_entropy)
    loss, statistics = _rows.compute(call)
    return loss if statistics is None else (loss, statistics)
