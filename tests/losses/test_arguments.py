"""Arguments that the losses refuse: messages name argument, value, expectation and way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import memeff
from memeff import losses

B, T = 3, 4
X = -torch.rand(B, T)
S = -torch.rand(B)
ONE = torch.ones(())
MASK = torch.ones(B, T)
H, W = torch.randn(B, T, 6), torch.randn(17, 6)
NAN, INF = float("nan"), float("inf")

Function = Callable[..., Tensor]


def grpo(**options: Any) -> Tensor:
    arguments = {"logprobs": X, "advantages": S, "mask": MASK, **options}
    return losses.grpo_loss(**arguments)


def weights(**options: Any) -> Tensor:
    return losses.grpo_token_weights(**{"mask": MASK, **options})


def ppo(**options: Any) -> Tensor:
    arguments = {"logprobs": X, "old_logprobs": X, "advantages": X, "mask": MASK, **options}
    return losses.ppo_loss(**arguments)


def dpo(**options: Any) -> Tensor:
    pairs = {"chosen": S, "rejected": S, "ref_chosen": S, "ref_rejected": S}
    return losses.dpo_loss(**{**pairs, **options})


def simpo(**options: Any) -> Tensor:
    return losses.simpo_loss(**{"chosen": S, "rejected": S, **options})


def cpo(**options: Any) -> Tensor:
    return losses.cpo_loss(**{"chosen": S, "rejected": S, "chosen_nll": ONE, **options})


def orpo(**options: Any) -> Tensor:
    return losses.orpo_loss(**{"chosen": S, "rejected": S, "chosen_nll": ONE, **options})


def kto(**options: Any) -> Tensor:
    arguments = {"logprobs": S, "ref_logprobs": S, "desirable": S > -0.5, **options}
    return losses.kto_loss(**arguments)


def focal(**options: Any) -> Tensor:
    return losses.focal_loss(**{"logprob": X, **options})


def smoothed(**options: Any) -> Tensor:
    return losses.label_smoothed_cross_entropy(**{"logprob": X, "lse": X, "mean": X, **options})


def z(**options: Any) -> Tensor:
    return losses.z_loss(**{"lse": X, **options})


def mean(**options: Any) -> Tensor:
    return losses.mean_logit(**{"input": H, "linear_weight": W, **options})


def sequences(**options: Any) -> Tensor:
    return losses.sequence_logprobs(**{"logprobs": X, "mask": MASK, **options})


def distill(**options: Any) -> Tensor:
    sides = {
        "student_input": H, "student_weight": W, "teacher_input": H, "teacher_weight": W,
    }  # fmt: skip
    return losses.linear_distillation_loss(**{**sides, **options})


def top_k(**options: Any) -> Tensor:
    return losses.top_k_distillation_loss(
        **{"student_logprobs": X - 2, "teacher_logprobs": X - 2, **options}
    )


ALL = (grpo, weights, ppo, dpo, simpo, cpo, orpo, kto, focal, smoothed, z, mean, sequences, distill,
       top_k)  # fmt: skip

# Every coefficient of every loss, with numbers outside of its range, and some at its edge.
COEFFICIENTS: list[tuple[Function, str, list[float], list[float], dict[str, Any]]] = [
    (grpo, "epsilon", [-0.1], [0, 0.0, 1, 3.0], {}),
    (grpo, "epsilon_high", [-0.1], [0.0, 5.0], {}),
    (grpo, "epsilon_high", [0, -1.0], [0.1], {"loss_type": "cispo"}),
    (grpo, "delta", [0, -1.0], [0.1], {}),
    (grpo, "beta", [-0.1], [0.0, 2], {"ref_logprobs": X}),
    (grpo, "entropy_coef", [], [-0.1, 0], {"entropy": X}),
    (ppo, "cliprange", [-0.1], [0.0, 2.0], {}),
    (ppo, "entropy_coef", [], [-0.1], {"entropy": X}),
    (dpo, "beta", [0, -0.1], [1e-3], {}),
    (dpo, "label_smoothing", [-0.1, 0.5, 1.0], [0, 0.49], {"loss_type": "robust"}),
    (simpo, "beta", [0.0, -1], [3], {}),
    (simpo, "gamma", [-0.1], [0.0], {}),
    (simpo, "label_smoothing", [-0.1, 0.6], [0.5], {}),
    (cpo, "beta", [0.0, -1], [3], {}),
    (cpo, "cpo_alpha", [-1.0], [0.0], {}),
    (cpo, "label_smoothing", [-0.1, 0.6], [0.5], {}),
    (orpo, "beta", [-0.1], [0.0], {}),
    (kto, "beta", [0.0, -1], [3], {}),
    (kto, "desirable_weight", [-1.0], [0.0], {}),
    (kto, "undesirable_weight", [-1.0], [0.0], {}),
    (focal, "gamma", [-1.0], [0.0], {}),
    (focal, "alpha", [-1.0], [0.0], {}),
    (smoothed, "label_smoothing", [-0.1, 1.1], [0, 1], {}),
    (z, "coefficient", [-0.1], [0.0], {}),
    (mean, "logit_scale", [0.0], [-1.0], {}),
    (distill, "beta", [-0.1, 1.1, 2], [0, 1], {}),
    (distill, "temperature", [0.0, -1.0], [0.5], {}),
    (distill, "student_softcap", [0.0, -1.0], [5.0], {}),
    (distill, "teacher_softcap", [0.0, -1.0], [5.0], {}),
    (distill, "student_logit_scale", [0.0], [-2.0], {}),
    (distill, "teacher_logit_scale", [0.0], [-2.0], {}),
]


@pytest.mark.parametrize("function", ALL)
def test_the_rest_of_the_arguments_is_fine(function: Function) -> None:
    assert function().isfinite().all()


@pytest.mark.parametrize(("function", "name", "outside", "inside", "others"), COEFFICIENTS)
def test_coefficients(
    function: Function, name: str, outside: list[float], inside: list[float], others: dict[str, Any]
) -> None:
    for value in (*outside, NAN, INF, -INF, 10**400):
        with pytest.raises(ValueError, match=f"^{name} is {value}, expected a"):
            function(**others, **{name: value})
    for bad in ("0.1", [0.1]):
        with pytest.raises(TypeError, match=f"^{name} must be a number, got {type(bad).__name__}"):
            function(**others, **{name: bad})
    for value in inside:
        assert function(**others, **{name: value}).isfinite().all()


def test_tensors_and_bools_are_no_coefficients() -> None:
    with pytest.raises(TypeError, match=r"beta must be a number, got Tensor, call \.item\(\)"):
        dpo(beta=torch.tensor(0.1))
    with pytest.raises(TypeError, match="beta must be a number, got bool"):
        dpo(beta=True)


# A tensor of each loss and the argument whose shape it must have.
SHAPES: list[tuple[Function, str, str]] = [
    *((grpo, name, "logprobs") for name in (
        "mask", "old_logprobs", "ref_logprobs", "importance_weights", "entropy",
    )),
    *((ppo, name, "logprobs") for name in ("old_logprobs", "advantages", "mask", "entropy")),
    *((dpo, name, "chosen") for name in ("rejected", "ref_chosen", "ref_rejected")),
    *((function, "rejected", "chosen") for function in (simpo, cpo, orpo)),
    *((kto, name, "logprobs") for name in ("ref_logprobs", "desirable")),
    *((smoothed, name, "logprob") for name in ("lse", "mean", "mask")),
    *((focal, name, "logprob") for name in ("alpha", "mask")),
    (z, "mask", "lse"),
    (sequences, "mask", "logprobs"),
    (top_k, "teacher_logprobs", "student_logprobs"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize(("function", "name", "like"), SHAPES)
def test_nothing_is_broadcast(function: Function, name: str, like: str) -> None:
    right = S if function in (dpo, simpo, cpo, orpo, kto) else X
    for shape in (right[:1], right[..., None], right.sum(), right.expand(2, *right.shape)):
        with pytest.raises(RuntimeError, match=f"^{name} has shape .*expected that of {like}"):
            function(**{name: shape})
    with pytest.raises(RuntimeError, match=r"\.reshape\(.*\) gives it that"):
        function(**{name: right[..., None]})
    kind = "number" if name == "alpha" else "torch.Tensor"
    needed = (grpo, sequences) if name == "mask" else (ppo,) if name == "advantages" else ()
    if function in needed or name in (
        "rejected",
        "ref_chosen",
        "ref_rejected",
        "desirable",
        "mean",
    ):
        with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got NoneType"):
            function(**{name: None})
    with pytest.raises(TypeError, match=f"^{name} must be a {kind}, got list"):
        function(**{name: right.tolist()})
    if name != "desirable":
        # Masks and advantages may be integers.
        real = name in ("mask", "advantages")
        expected = "real numbers" if real else "one of torch.bfloat16"
        dtypes = [
            torch.complex64,
            torch.float8_e4m3fn,
            *([] if real else [torch.int64, torch.bool]),
        ]
        for dtype in dtypes:
            with pytest.raises(
                RuntimeError, match=f"^{name} has dtype {dtype}, expected {expected}"
            ):
                function(**{name: right.to(dtype)})
        with pytest.raises(RuntimeError, match=rf"^{name} has dtype torch.qint8.*\.dequantize\(\)"):
            function(**{name: torch.quantize_per_tensor(right, 0.1, 0, torch.qint8)})
    with pytest.raises(RuntimeError, match=f"^{name} is on meta, expected the device of {like}"):
        function(**{name: right.to("meta")})


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (grpo, "logprobs"), (ppo, "logprobs"), (dpo, "chosen"), (simpo, "chosen"),
        (cpo, "chosen"), (orpo, "chosen"), (kto, "logprobs"), (smoothed, "logprob"),
        (focal, "logprob"), (z, "lse"), (mean, "input"), (sequences, "logprobs"),
        (distill, "student_input"), (distill, "teacher_input"), (top_k, "student_logprobs"),
    ],
)  # fmt: skip
def test_dtypes(function: Function, name: str) -> None:
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e5m2):
        with pytest.raises(RuntimeError, match=f"^{name} has dtype {dtype}, expected one of"):
            function(**{name: torch.zeros(B, T).to(dtype)})
    with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got NoneType"):
        function(**{name: None})


def test_labels_of_kto() -> None:
    for labels in (torch.tensor([1, -1, 1]), torch.tensor([1.0, 0.0, 1.0])):
        with pytest.raises(RuntimeError, match=r"desirable has dtype .*, expected torch\.bool.*>"):
            kto(desirable=labels)
    assert torch.equal(kto(desirable=torch.tensor([1, -1, 1]) > 0),
                       kto(desirable=torch.tensor([True, False, True])))  # fmt: skip
    with pytest.raises(ValueError, match="ref_kl_logprobs is None, expected a tensor, as kl_log"):
        kto(kl_logprobs=S)
    with pytest.raises(ValueError, match=r"^kl_logprobs is None, expected a tensor, as ref_kl_"):
        kto(ref_kl_logprobs=S)
    with pytest.raises(RuntimeError, match=r"ref_kl_logprobs has shape \(3,\), expected .* \(2,\)"):
        kto(kl_logprobs=S[:2], ref_kl_logprobs=S)


@pytest.mark.parametrize("function", [cpo, orpo])
def test_chosen_nll_is_a_scalar(function: Function) -> None:
    with pytest.raises(RuntimeError, match=r"chosen_nll has shape \(3,\), expected a scalar.*mean"):
        function(chosen_nll=S)


@pytest.mark.parametrize("function", [grpo, weights, distill])
def test_num_items(function: Function) -> None:
    for bad in (-1, -0.5, NAN, INF, torch.tensor(-2), torch.tensor(NAN)):
        with pytest.raises(ValueError, match=r"num_items is .*, expected the number of items"):
            function(num_items=bad)
    odd = (torch.ones((), dtype=torch.complex64), torch.tensor(True), numpy.ones(2), numpy.ones(0))
    for wrong in (torch.ones(2), *odd):
        with pytest.raises(RuntimeError, match=r"num_items has shape .*, expected one real num"):
            function(num_items=wrong)
    for kind in ("3", True, [3]):
        with pytest.raises(TypeError, match="num_items must be a number or a tensor with one"):
            function(num_items=kind)
    three = function(num_items=3)
    for same in (3.0, numpy.int64(3), numpy.float32(3), torch.tensor(3), torch.tensor([3.0])):
        torch.testing.assert_close(function(num_items=same), three)


@pytest.mark.parametrize("function", [grpo, ppo])
def test_given_coefficients_ask_for_their_tensors(function: Function) -> None:
    with pytest.raises(ValueError, match=r"entropy is None.*entropy_coef is 0\.1"):
        function(entropy_coef=0.1)
    if function is grpo:
        with pytest.raises(ValueError, match=r"ref_logprobs is None.*beta is 0\.1"):
            grpo(beta=0.1)
        with pytest.raises(ValueError, match=r'entropy_coef is 0\.1 with reduction="none"'):
            grpo(entropy_coef=0.1, entropy=X, reduction="none")


FLAGS = [(grpo, "use_bias_correction_kl"), (sequences, "average"), (top_k, "add_tail")]


@pytest.mark.parametrize(("function", "name"), FLAGS)
def test_flags_are_bools(function: Function, name: str) -> None:
    for value in (1, "no", torch.tensor(True), None):
        with pytest.raises(TypeError, match=f"^{name} must be a bool, got {type(value).__name__}"):
            function(**{name: value})


@pytest.mark.parametrize("function", [weights, distill, top_k])
def test_masks_of_tokens(function: Function) -> None:
    mask = torch.ones(B) if function is top_k else MASK
    for dtype in (torch.bool, torch.int64, torch.uint8, torch.float16):
        assert torch.equal(function(mask=mask.to(dtype)), function(mask=mask))
    for dtype in (torch.complex64, torch.float8_e5m2):
        with pytest.raises(RuntimeError, match=f"^mask has dtype {dtype}, expected real numbers"):
            function(mask=mask.to(dtype))
    if function is not weights:
        with pytest.raises(
            RuntimeError, match=r"^mask is on meta, expected the device of student_"
        ):
            function(mask=mask.to("meta"))


def test_choices() -> None:
    for function, name in (
        (grpo, "loss_type"), (grpo, "importance_sampling_level"), (grpo, "reduction"),
        (weights, "loss_type"), (ppo, "reduction"), (dpo, "loss_type"), (dpo, "reduction"),
        (kto, "reduction"), (simpo, "reduction"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name} is 'x', expected one of '"):
            function(**{name: "x"})
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.1 with loss_type='ipo'.*robust"):
        dpo(label_smoothing=0.1, loss_type="ipo")


def test_shapes_of_the_grpo_family() -> None:
    for advantages in (torch.zeros(T), torch.zeros(B, 1), torch.zeros(B, T, 1)):
        with pytest.raises(RuntimeError, match=r"advantages has shape .*, expected \(3,\), one"):
            grpo(advantages=advantages)
    flat = {"logprobs": X[0], "advantages": X[0], "mask": MASK[0]}
    with pytest.raises(RuntimeError, match=r"logprobs has shape \(4,\), expected \[B, T\].*none"):
        grpo(**flat)
    with pytest.raises(RuntimeError, match=r"logprobs has shape \(4,\), expected \[B, T\]"):
        grpo(**flat, reduction="none", importance_sampling_level="sequence")
    assert grpo(**flat, reduction="none").shape == (T,)
    with pytest.raises(RuntimeError, match=r"mask has shape \(4,\), expected \[B, T\]"):
        weights(mask=MASK[0])
    for length in (0, -3):
        with pytest.raises(ValueError, match=f"max_completion_length is {length}, expected a num"):
            grpo(loss_type="dr_grpo", max_completion_length=length)
    for bad in (3.0, True, "3"):
        with pytest.raises(
            TypeError, match=r"max_completion_length must be an int, a number of to"
        ):
            grpo(loss_type="dr_grpo", max_completion_length=bad)
    with pytest.raises(
        ValueError, match=r"max_completion_length is 9223372036854775808, .*64 bits"
    ):
        grpo(loss_type="dr_grpo", max_completion_length=2**63)
    assert grpo(loss_type="dr_grpo", max_completion_length=2**63 - 1).isfinite()
    for dtype in (torch.int64, "float32", None):
        with pytest.raises(TypeError, match=r"dtype is .*, expected a floating torch\.dtype"):
            weights(dtype=dtype)


def test_heads_of_distillation() -> None:
    for name, tensor, message in (
        ("teacher_input", H[:1], r"teacher_input has shape \(1, 4, 6\), expected the tokens of"),
        (
            "teacher_weight",
            W[:5],
            r"student_weight has 17 classes and teacher_weight 5.*vocab",
        ),
        ("student_weight", W[:, :5], r"student_weight has shape \(17, 5\), expected 6 feat"),
        ("teacher_weight", W[0], r"teacher_weight has shape \(6,\), expected \[V, D\]"),
        ("student_weight", W.double(), r"student_weight has dtype torch.float64, expected that of"),
        ("teacher_bias", W[:, 0].half(), r"teacher_bias has dtype torch.float16, expected that of"),
        ("student_bias", W[:5, 0], r"student_bias has shape \(5,\), expected \(17,\)"),
        ("mask", MASK[:1], r"mask has shape \(1, 4\), expected \(3, 4\), one per token"),
        ("teacher_input", H.to("meta"), r"teacher_weight is on cpu, expected the device of teach"),
    ):
        with pytest.raises(RuntimeError, match=message):
            distill(**{name: tensor})
    for size in (0, -1, 18):
        with pytest.raises(ValueError, match=rf"vocab_size is {size}, expected .* \[1, 17\]"):
            distill(vocab_size=size)
    with pytest.raises(TypeError, match="vocab_size must be an int or None, got float"):
        distill(vocab_size=5.0)
    with pytest.raises(ValueError, match="chunk_size is 3 and memory_budget is 4000, expected"):
        distill(chunk_size=3, memory_budget=4000)
    with pytest.raises(ValueError, match="memory_budget is 10 bytes, expected at least"):
        distill(memory_budget=10)
    with pytest.raises(RuntimeError, match=r"mask has shape \(3, 4\), expected \(3,\), one per"):
        top_k(mask=MASK)


def test_module() -> None:
    assert memeff.losses is losses
    assert all(callable(getattr(losses, name)) for name in losses.__all__)
