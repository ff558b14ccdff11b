"""transformers' Trainer, generate, saving and loading, with a patched model: nothing of the script
changes, and nothing computes the logits in training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from families import VOCAB, gradient_error, make_batch, make_model

import memeff
from memeff.lazy.carriers import LazyObject

STEPS = 3
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def examples(count: int = 12) -> list[dict[str, list[int]]]:
    """Of different lengths, so that averages of micro-batches are not the average of tokens."""
    generator = torch.Generator().manual_seed(5)
    result = []
    for i in range(count):
        ids = torch.randint(3, VOCAB, (6 + i % 5,), generator=generator).tolist()
        result.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return result


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(one["input_ids"]) for one in batch)

    def pad(name: str, value: int) -> torch.Tensor:
        return torch.tensor([b[name] + [value] * (longest - len(b[name])) for b in batch])

    ids = pad("input_ids", 0)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": pad("labels", -100)}


def train(model: Any, folder: Any, **options: Any) -> tuple[list[float], dict[str, float], Any]:
    """Losses of the steps, metrics of an evaluation, and the trainer."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
        **options,
    )

    def metrics(prediction: Any) -> dict[str, float]:
        ids, labels = prediction.predictions, prediction.label_ids
        kept = labels[:, 1:] != -100
        return {"accuracy": float((ids[:, :-1] == labels[:, 1:])[kept].mean())}

    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=examples(),
        eval_dataset=examples(6),
        data_collator=collate,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate(), trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing_factor": 0.1},
        {"gradient_checkpointing": True},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        {"average_tokens_across_devices": False},
    ],
    ids=str,
)
def test_trainer(options: dict[str, Any], tmp_path: Any) -> None:
    plain = make_model("causal", "llama")
    model = copy.deepcopy(plain)
    report = memeff.patch(model, strict=True)  # any computation of logits is an error
    losses, metrics, _ = train(model, tmp_path / "lazy", **options)
    expected, expected_metrics, _ = train(plain, tmp_path / "plain", **options)
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(expected_metrics["eval_loss"], rel=1e-5)
    assert metrics["eval_accuracy"] == expected_metrics["eval_accuracy"]
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    ran = "gather" if "label_smoothing_factor" in options else "cross_entropy"
    assert report.without_logits[ran] > 0


def test_trainer_in_bf16(tmp_path: Any) -> None:
    """Autocast: losses as near to those in float32 as the plain model's are."""
    exact = make_model("causal", "llama")
    plain, model = copy.deepcopy(exact), copy.deepcopy(exact)
    memeff.patch(model, strict=True)
    losses, _, _ = train(model, tmp_path / "lazy", bf16=True)
    expected, _, _ = train(plain, tmp_path / "plain", bf16=True)
    truth, _, _ = train(exact, tmp_path / "exact")
    allowed = max(abs(e - t) for e, t in zip(expected, truth, strict=True)) + 2**-8 * truth[0]
    assert all(abs(ours - t) <= allowed for ours, t in zip(losses, truth, strict=True))


def test_evaluation_that_gathers_logits(tmp_path: Any) -> None:
    """Without preprocess_logits_for_metrics the Trainer keeps all logits: they are computed."""
    plain = make_model("causal", "llama")
    model = copy.deepcopy(plain)
    memeff.patch(model)
    _, _, trainer = train(model, tmp_path)
    trainer.preprocess_logits_for_metrics = trainer.compute_metrics = None
    plain.load_state_dict(model.state_dict())
    plain.eval()
    prediction = trainer.predict(examples(3))
    batch = collate(examples(3))
    with torch.no_grad():
        expected = plain(**batch).logits
    torch.testing.assert_close(torch.from_numpy(prediction.predictions), expected)


def test_grad_scaler() -> None:
    """float16 with a scaled loss."""
    plain = make_model("causal", "llama").half()
    model = copy.deepcopy(plain)
    memeff.patch(model, strict=True)
    batch = make_batch("causal", model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for m in (model, plain):
        scaler.scale(m(**batch).loss).backward()
    assert gradient_error(model, plain) <= 1e-2  # of float16


@pytest.mark.parametrize(
    "kind_and_type", [("causal", "llama"), ("causal", "gemma2"), ("seq2seq", "t5")]
)
def test_generate(kind_and_type: tuple[str, str]) -> None:
    plain = make_model(*kind_and_type)
    model = copy.deepcopy(plain)
    report = memeff.patch(model)
    batch = make_batch(kind_and_type[0], model)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    for options in (
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_k": 5},
        {"num_beams": 3},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": False, "output_scores": True, "return_dict_in_generate": True},
    ):
        results = []
        for m in (model, plain):
            torch.manual_seed(7)
            out = m.generate(**inputs, max_new_tokens=5, pad_token_id=0, **options)
            results.append(out if isinstance(out, torch.Tensor) else out.sequences)
        assert torch.equal(*results), options
    assert report.heads


def test_save_and_load(tmp_path: Any) -> None:
    model = make_model("causal", "gpt2")  # tied embeddings
    batch = make_batch("causal", model)
    expected = model(**batch).loss
    memeff.patch(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded.lm_head) is torch.nn.Linear
    torch.testing.assert_close(loaded(**batch).loss, expected)
    torch.testing.assert_close(model(**batch).loss, expected)
    model.resize_token_embeddings(VOCAB + 7)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_tied_weight_gets_both_gradients() -> None:
    plain = make_model("causal", "gpt2")
    assert plain.lm_head.weight is plain.transformer.wte.weight
    model = copy.deepcopy(plain)
    memeff.patch(model, strict=True)
    batch = make_batch("causal", model)
    for m in (model, plain):
        m(**batch).loss.backward()
    assert gradient_error(model, plain) <= 2e-6


def test_auxiliary_loss_of_experts() -> None:
    plain = make_model("causal", "mixtral")
    plain.config.output_router_logits = True
    plain.config.router_aux_loss_coef = 0.5
    model = copy.deepcopy(plain)
    memeff.patch(model, strict=True)
    batch = make_batch("causal", model)
    results = [m(**batch, output_router_logits=True) for m in (model, plain)]
    assert results[0].aux_loss > 0
    torch.testing.assert_close(results[0].loss, results[1].loss, rtol=1e-6, atol=1e-6)
    for result in results:
        result.loss.backward()
    assert gradient_error(model, plain) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "dynamic"), [("qwen3", False), ("gemma2", False), ("llama", True)]
)
def test_compiled_model(model_type: str, dynamic: bool) -> None:
    """fullgraph, of the unmodified model with its loss inside; lengths change with dynamic=True."""
    torch._dynamo.reset()
    plain = make_model("causal", model_type)
    model = copy.deepcopy(plain)
    memeff.patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic or None)
    batch = make_batch("causal", model)
    for length in (24, 17) if dynamic else (24,):
        cut = {name: tensor[:, :length] for name, tensor in batch.items()}
        results = [m(**cut) for m in (compiled, plain)]
        assert isinstance(results[0].logits, LazyObject)
        torch.testing.assert_close(results[0].loss, results[1].loss, rtol=1e-5, atol=1e-6)
        for result in results:
            result.loss.backward()
    assert gradient_error(model, plain) <= 1e-5
