"""memeff under TRL's fused head: the function itself, and trainers that use it, against plain TRL.

Everything is made here: tiny random models, a tokenizer of words, a few sentences.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

import tokenizers
import trl.trainer.utils as trl_utils

import memeff
from buildtools.sources import ROOT
from memeff.bench.problem import make_problem
from memeff.bench.shapes import Shape
from memeff.integrations import trl as integration

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TEXT = "the a cat dog bird sat ran flew on under mat tree sky red blue fast slow and then yes"
WORDS = TEXT.split()
integration.unpatch()
PLAIN = trl_utils._ChunkedLogProbFunction
STEPS = 20

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
]


@pytest.fixture(autouse=True)
def plain_before_and_afterwards() -> Iterator[None]:
    integration.unpatch()  # after a snippet of the documentation, say
    yield
    integration.unpatch()
    assert trl_utils._ChunkedLogProbFunction is PLAIN


# ------------------------------------------------------------------ the function


def exact(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
) -> dict[str, Tensor]:
    """All outputs by their formulas, from logits."""
    z = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    log_p = z.log_softmax(-1)
    return {
        "log_probs": log_p.gather(-1, targets[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == targets,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_function(dtype: torch.dtype, bias: bool, softcap: float | None) -> None:
    """All outputs and gradients, as near to float64 as TRL's own function gets."""
    tokens, features, vocab, temperature, scale = 37, 24, 1003, 0.7, 1.5
    x = torch.randn(tokens, features)
    w = torch.randn(vocab, features) / 3
    b = torch.randn(vocab) if bias else None
    operands = [None if t is None else t.to(dtype) for t in (x, w, b)]
    targets = torch.randint(vocab, (tokens,))
    rest = (targets, temperature, 512, softcap, scale, OUTPUTS)
    upstream = torch.randn(2, tokens)
    upstream[:, ::3] = 0

    def run(
        function: Callable[..., Any], to: torch.dtype
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        leaves = [None if t is None else t.to(to, copy=True).requires_grad_() for t in operands]
        found = function(*leaves)
        (found["log_probs"] * upstream[0] + found["entropy"] * upstream[1]).sum().backward()
        assert not found["mean_logits"].requires_grad or to is torch.float64
        return found, [t.grad.double() for t in leaves if t is not None]

    def named(function: Any) -> Callable[..., dict[str, Tensor]]:
        return lambda *leaves: dict(zip(OUTPUTS, function.apply(*leaves, *rest), strict=True))

    truth, true_grads = run(
        lambda x, w, b: exact(x, w, b, targets, temperature, softcap, scale), torch.float64
    )
    theirs, their_grads = run(named(PLAIN), dtype)
    integration.patch()
    assert trl_utils._ChunkedLogProbFunction is not PLAIN
    ours, our_grads = run(named(trl_utils._ChunkedLogProbFunction), dtype)

    eps = torch.finfo(torch.float32).eps
    for name in OUTPUTS[:-1]:
        assert ours[name].dtype == theirs[name].dtype
        scale_of = truth[name].norm() + tokens**0.5
        error = (ours[name].double() - truth[name]).norm()
        assert error <= (theirs[name].double() - truth[name]).norm() + 4 * eps * scale_of, name
    assert torch.equal(ours["is_top1"], truth["is_top1"])
    for ours_, theirs_, exact_ in zip(our_grads, their_grads, true_grads, strict=True):
        allowed = 1.1 * (theirs_ - exact_).norm() + torch.finfo(dtype).eps * exact_.norm()
        assert (ours_ - exact_).norm() <= allowed


def test_function_computes_what_is_asked_for() -> None:
    integration.patch()
    x, w, y = torch.randn(5, 8), torch.randn(11, 8), torch.randint(11, (5,))
    found = trl_utils._ChunkedLogProbFunction.apply(
        x, w, None, y, 1.0, 64, None, 1.0, ("log_probs",)
    )
    assert [value is not None for value in found] == [True, False, False, False, False]
    # A batch of which no token is scored.
    x = x.requires_grad_()
    none = trl_utils._ChunkedLogProbFunction.apply(x[:0], w, None, y[:0], 1.0, 64)
    assert [tuple(value.shape) for value in none] == [(0,)] * 5
    none[0].sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    # A head in float32 over hidden states in it (cast_lm_head_to_fp32), its weight in bfloat16.
    w16 = w.bfloat16().requires_grad_()
    mixed = trl_utils._ChunkedLogProbFunction.apply(x, w16, None, y, 1.0, 64, None, 1.0, ())
    mixed[0].sum().backward()
    assert mixed[0].dtype == torch.float32 and w16.grad.dtype == torch.bfloat16


def test_first_of_equal_logits_is_top1() -> None:
    integration.patch()
    x, w = torch.ones(2, 4), torch.ones(6, 4)
    y = torch.tensor([0, 3])
    found = trl_utils._ChunkedLogProbFunction.apply(x, w, None, y, 1.0, 64)
    assert found[4].tolist() == PLAIN.apply(x, w, None, y, 1.0, 64)[4].tolist() == [True, False]


def test_refuses_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    class Another(PLAIN):  # type: ignore[misc, valid-type]
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Any:
            raise AssertionError

    class Reordered:
        forward = PLAIN.forward

        @staticmethod
        def apply(*arguments: Any) -> Any:
            first, entropy, squares, mean, top = PLAIN.apply(*arguments)
            return first, entropy, mean, squares, top

    for other, words in ((Another, "takes"), (Reordered, "other results"), (None, "not exist")):
        monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", other)
        with pytest.raises(RuntimeError, match=f"{words}.*trl=="):
            integration.patch()
        assert trl_utils._ChunkedLogProbFunction is other
    monkeypatch.undo()


def test_patch_and_unpatch_repeat() -> None:
    integration.unpatch()
    integration.patch()
    integration.patch()
    integration.unpatch()
    assert trl_utils._ChunkedLogProbFunction is PLAIN
    integration.unpatch()


@pytest.mark.parametrize("way", ["trl", "memeff"])
def test_benchmark_takes_a_step(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/trl_head.py"""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import trl_head

    problem = make_problem(Shape(16, 8, 40), torch.float32)
    trl_head.step(way, problem)
    for gradient in (problem.x.grad, problem.w.grad):
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


# ------------------------------------------------------------------ trainers


def tokenizer() -> Any:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_model() -> Any:
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(WORDS) + 3,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def sentences(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(2)
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (3 + k % 4,), generator=generator))
        for k in range(count)
    ]


def rows(*columns: str, **more: Any) -> Any:
    made = {name: sentences(20 + i)[i:] for i, name in enumerate(columns)}
    return datasets.Dataset.from_dict({**made, **more})


def word_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(one.split())) - one.count("cat")) for one in completions]


def sft(**options: Any) -> Any:
    return trl.SFTTrainer, trl.SFTConfig(**options), rows("prompt", "completion"), {}


def dpo(**options: Any) -> Any:
    config = trl.DPOConfig(precompute_ref_log_probs=False, **options)
    return trl.DPOTrainer, config, rows("prompt", "chosen", "rejected"), {}


def dpo_weighted(**options: Any) -> Any:
    return dpo(use_weighting=True, **options)


def grpo(**options: Any) -> Any:
    config = trl.GRPOConfig(num_generations=2, max_completion_length=4, beta=0.1, **options)
    return trl.GRPOTrainer, config, rows("prompt"), {"reward_funcs": word_reward}


def rloo(**options: Any) -> Any:
    config = trl.RLOOConfig(num_generations=2, max_completion_length=4, beta=0.1, **options)
    return trl.RLOOTrainer, config, rows("prompt"), {"reward_funcs": word_reward}


def kto(**options: Any) -> Any:
    labels = [bool(i % 2) for i in range(20)]
    return trl.KTOTrainer, trl.KTOConfig(**options), rows("prompt", "completion", label=labels), {}


def orpo(**options: Any) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    config = ORPOConfig(max_length=24, **options)
    return ORPOTrainer, config, rows("prompt", "chosen", "rejected"), {}


def cpo(**options: Any) -> Any:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    config = CPOConfig(max_length=24, **options)
    return CPOTrainer, config, rows("prompt", "chosen", "rejected"), {}


def train(make: Any, model: Any, folder: Path, steps: int) -> list[dict[str, float]]:
    """What each step logs; the model is trained in place."""
    kind, config, data, more = make(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=4,
    )
    trainer = kind(
        model=model, args=config, train_dataset=data, processing_class=tokenizer(), **more
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def check_trainer(make: Any, folder: Path, steps: int, *, by_patching_model: bool = False) -> None:
    """Losses, metrics and trained parameters are those of plain TRL."""
    plain = tiny_model()
    plain.save_pretrained(folder / "start")  # where trainers load the reference model from
    plain.config._name_or_path = str(folder / "start")
    start = copy.deepcopy(plain)
    model = copy.deepcopy(plain)
    expected = train(make, plain, folder / "plain", steps)
    calls: list[int] = []
    report = memeff.patch(model) if by_patching_model else None
    integration.patch()
    computed = integration._LogProbs.apply
    integration._LogProbs.apply = lambda *a: calls.append(1) or computed(*a)  # type: ignore
    try:
        found = train(make, model, folder / "memeff", steps)
    finally:
        integration._LogProbs.apply = staticmethod(computed)  # type: ignore
        integration.unpatch()
    if report is None:
        assert calls
    else:
        assert report.without_logits and not report.materialised, str(report)
    assert len(found) == len(expected) == steps
    timing = ("runtime", "per_second", "flos", "step_time")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-5)
        for name, value in theirs.items():
            if isinstance(value, float) and not any(word in name for word in timing):
                assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name
    for ours, theirs, before in zip(
        model.parameters(), plain.parameters(), start.parameters(), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-3 * (theirs - before).norm()


@pytest.mark.parametrize("make", [sft, dpo, grpo])
def test_trainer(make: Any, tmp_path: Path) -> None:
    check_trainer(make, tmp_path, STEPS)


@pytest.mark.parametrize("make", [dpo_weighted, kto, rloo])
def test_other_trainers(make: Any, tmp_path: Path) -> None:
    check_trainer(make, tmp_path, 4)


@pytest.mark.parametrize("make", [orpo, cpo])
def test_trainers_with_logits(make: Any, tmp_path: Path) -> None:
    """These ask the model for logits: lazy ones."""
    check_trainer(make, tmp_path, 4, by_patching_model=True)
