"""Tiny random models of every family of transformers, plain and under memeff.patch.

`python tests/lazy/families.py --write` tries all and writes docs/families.md; test_families.py
asserts the same of some of them, or with --all-families of all.
"""

from __future__ import annotations

import copy
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import memeff
from memeff.lazy.report import Report

KINDS = {
    "causal": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM),
    "seq2seq": (
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        transformers.AutoModelForSeq2SeqLM,
    ),
    "masked": (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, transformers.AutoModelForMaskedLM),
}
VOCAB = 101
LENGTH = 24
LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 2e-6
SECONDS = 100

# What makes a model tiny, under the names that configurations have for it.
_SIZES: dict[int | float, str] = {
    VOCAB: "vocab_size",
    32: "hidden_size d_model n_embd embed_dim embedding_size dim hidden_dim d_embed "
    "moe_intermediate_size expert_ffn_hidden_size word_embed_proj_dim encoder_hidden_size "
    "decoder_hidden_size mamba_d_ssm attention_hidden_size lru_width",
    64: "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim "
    "max_position_embeddings n_positions n_ctx max_sequence_length mamba_intermediate "
    "dense_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "max_seq_len feed_forward_size intermediate_size_mlp",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
    "decoder_attention_heads num_local_experts num_experts n_routed_experts moe_num_experts "
    "num_encoder_attention_heads num_decoder_attention_heads mamba_n_heads "
    "linear_num_value_heads n_expert",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
    "num_decoder_layers num_encoder_layers num_key_value_heads num_experts_per_tok "
    "moe_k n_kv_heads num_kv_heads linear_num_key_heads ",
    1: "n_group topk_group n_shared_experts first_k_dense_replace",
    8: "head_dim attention_head_size qk_rope_head_dim qk_nope_head_dim v_head_dim "
    "state_size kv_channels linear_key_head_dim linear_value_head_dim mamba_d_state",
    16: "q_lora_rank kv_lora_rank mamba_d_head time_step_rank",
    0.0: "dropout attention_dropout hidden_dropout_prob attention_probs_dropout_prob resid_pdrop "
    "embd_pdrop attn_pdrop activation_dropout hidden_dropout resid_dropout embedding_dropout "
    "classifier_dropout dropout_rate emb_dropout embed_dropout attn_dropout encoder_layerdrop "
    "decoder_layerdrop layerdrop router_jitter_noise",
}  # fmt: skip
TINY = {name: size for size, names in _SIZES.items() for name in names.split()}
# Sizes that a configuration derives from others where they are None.
_DERIVED = ("head_dim", "num_key_value_heads", "vocab_size")
_FOUR_LAYERS = {"num_hidden_layers": 4}  # of which the last has attention
_SWITCHING = {"num_layers": 2, "num_decoder_layers": 2, "decoder_start_token_id": 0}
# Where the sizes above contradict each other, or a family has more of them.
_SPECIAL: dict[str, dict[str, Any]] = {
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    "ctrl": {"dff": 64},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "longformer": {"attention_window": 8},
    "led": {"attention_window": 8, "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "qwen3_next": _FOUR_LAYERS, "qwen3_5_text": _FOUR_LAYERS, "qwen3_5_moe_text": _FOUR_LAYERS,
    "kimi_linear": _FOUR_LAYERS, "qwen4_exp_text": _FOUR_LAYERS, "lfm3": _FOUR_LAYERS,
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 3},
    "t5": _SWITCHING, "switch_transformers": _SWITCHING, "longt5": _SWITCHING,
}  # fmt: skip


@dataclass
class Outcome:
    """How a family fared.

    "lazy": no logits in training; "computes logits" or "plain head": correct, and why logits exist;
    "not built": there is no tiny model of it here, or transformers itself fails with it; "WRONG".
    """

    status: str
    detail: str = ""


def families() -> Iterator[tuple[str, str]]:
    """(kind, model type) of all that the installed transformers lists."""
    for kind, (names, _) in KINDS.items():
        for model_type in names:
            yield kind, model_type


def tiny_config(model_type: str) -> Any:
    """A configuration of a family with small sizes."""
    cls = CONFIG_MAPPING[model_type]
    return cls(**{**_shrunk(cls().to_dict()), **_SPECIAL.get(model_type, {})})


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value.get("model_type"):  # of a part of the model
            model_type = value["model_type"]
            special = _SPECIAL.get(model_type, {})
            small[name] = {**_shrunk(value), **special, "model_type": model_type}
        elif name in TINY and isinstance(value, (int, float)) and not isinstance(value, bool):
            small[name] = type(value)(TINY[name])
        elif name in _DERIVED and value is None:
            small[name] = TINY[name]
        elif name.endswith("_token_id") and isinstance(value, int) and value >= VOCAB:
            small[name] = 2
    if "kv_lora_rank" in values:  # latent attention has one key per query
        small["num_key_value_heads"] = TINY["num_attention_heads"]
    return small


def make_model(kind: str, model_type: str) -> Any:
    config = tiny_config(model_type)
    if kind == "seq2seq" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    torch.manual_seed(0)
    model = KINDS[kind][1].from_config(config)
    return model.float().eval()  # eval: no dropout, whatever it is called


def make_batch(kind: str, model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=generator)
    labels = (
        ids.clone()
        if kind == "causal"
        else torch.randint(3, VOCAB, (2, LENGTH), generator=generator)
    )
    labels[:, :3] = -100
    labels[0, -5:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def run(kind: str, model_type: str) -> Outcome:
    """Loss, gradients, argmax and generate of a family, plain and patched."""
    try:
        plain = make_model(kind, model_type)
        batch = make_batch(kind, plain)
        expected = plain(**batch).loss
        expected.backward()
        expected_generated = _generate(kind, plain, batch)
        with torch.no_grad():
            expected_argmax = plain(**batch).logits.argmax(-1)
    except Exception as error:
        return Outcome("not built", _short(error))
    if not expected.isfinite():
        return Outcome("not built", f"its loss is {expected.item()}")
    model = copy.deepcopy(plain)
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            report = memeff.patch(model)
        except ValueError as error:
            return Outcome("no head found", _short(error))
        loss = model(**batch).loss
        loss.backward()
        training = copy.deepcopy(report)
        generated = _generate(kind, model, batch)
        with torch.no_grad():
            argmax = model(**batch).logits.argmax(-1)
    error = abs(loss.item() - expected.item()) / max(1.0, abs(expected.item()))
    if error > LOSS_TOLERANCE:
        return Outcome("WRONG", f"relative error of the loss {error:.1e}")
    error = gradient_error(model, plain)
    if error > GRADIENT_TOLERANCE:
        # Float32 itself may be no more exact: of two results the truth decides.
        exact = copy.deepcopy(plain).double()
        exact.zero_grad()
        exact(**batch).loss.backward()
        error, plain_error = gradient_error(model, exact), gradient_error(plain, exact)
        if error > 1.1 * plain_error + GRADIENT_TOLERANCE:
            return Outcome(
                "WRONG",
                f"error of the gradients {error:.1e}, of the plain head's {plain_error:.1e}",
            )
    if not torch.equal(argmax, expected_argmax):
        return Outcome("WRONG", "argmax differs")
    if generated is not None and not torch.equal(generated, expected_generated):
        return Outcome("WRONG", "generate differs")
    return _outcome_of(training)


def gradient_error(model: Any, plain: Any) -> float:
    """Norm of the difference of all gradients, over the norm of all."""
    difference, total = 0.0, 0.0
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            difference += (ours.grad.double() - theirs.grad.double()).square().sum().item()
            total += theirs.grad.double().square().sum().item()
    return (difference / total) ** 0.5


def _outcome_of(report: Report) -> Outcome:
    if report.left_dense:
        return Outcome("plain head", "; ".join(report.left_dense.values()))
    if report.materialised:
        places = [
            f"{name} in {Path(entry.where.partition(':')[0]).name}:{entry.where.rpartition(':')[2]}"
            for name, entry in report.materialised.items()
        ]
        return Outcome("computes logits", "; ".join(places))
    if not report.without_logits:
        return Outcome("plain head", "the head that makes the loss is another one")
    return Outcome("lazy")


def _generate(kind: str, model: Any, batch: dict[str, Tensor]) -> Tensor | None:
    if kind == "masked":
        return None
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 1}
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    generated: Tensor = model.generate(**inputs, **options)
    return generated


def _short(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:140]}"


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def try_one(kind: str, model_type: str) -> Outcome:
    """`run` within a time limit."""
    try:
        with time_limit(SECONDS):
            return run(kind, model_type)
    except TimeoutError as error:
        return Outcome("not built", str(error))
    except Exception as error:
        return Outcome("ERROR", _short(error))


def as_markdown(outcomes: dict[tuple[str, str], Outcome]) -> str:
    """The page of all families."""
    version = transformers.__version__
    by_status: dict[str, list[tuple[str, str, Outcome]]] = {}
    for (kind, model_type), outcome in outcomes.items():
        by_status.setdefault(outcome.status, []).append((kind, model_type, outcome))
    lines = [
        "# Families of transformers under memeff.patch",
        "",
        "Every causal, sequence-to-sequence and masked language model that transformers",
        f"{version} lists, as a tiny random model in float32 on a CPU, with its own loss: value,",
        "gradients, argmax and `generate` against the plain head. Made by",
        "`python tests/lazy/families.py --write`.",
        "",
        f"**Lazy in training, no logits anywhere: {len(by_status.get('lazy', []))} of "
        f"{len(outcomes)}.**",
    ]
    for kind in KINDS:
        names = sorted(m for k, m, _ in by_status.get("lazy", []) if k == kind)
        lines += ["", f"{kind} ({len(names)}): {', '.join(names)}"]
    for status, title in _TITLES.items():
        rows = by_status.get(status, [])
        if rows:
            lines += [
                "",
                f"**{title}: {len(rows)}.**",
                "",
                "| kind | family | why |",
                "| --- | --- | --- |",
            ]
            lines += [
                f"| {kind} | {model_type} | {_cell(outcome.detail)} |"
                for kind, model_type, outcome in rows
            ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """`text` in a table of Markdown, where | ends a cell and [x][y] is a link."""
    return text.replace("|", "/").replace("[", "\\[")


_TITLES = {
    "computes logits": "Correct, but something computes the logits",
    "plain head": "Correct, with the plain head",
    "no head found": "No head found; pass `head=`",
    "not built": "Not tried: no tiny model of it builds and trains here without memeff",
    "WRONG": "Wrong",
    "ERROR": "Errors under memeff.patch",
}


def main() -> None:
    chosen = [argument for argument in sys.argv[1:] if argument != "--write"]
    outcomes = {}
    for kind, model_type in families():
        if chosen and model_type not in chosen:
            continue
        outcome = outcomes[kind, model_type] = try_one(kind, model_type)
        print(f"{kind:8s} {model_type:28s} {outcome.status:16s} {outcome.detail}", flush=True)
    if "--write" in sys.argv:
        page = Path(__file__).parents[2] / "docs" / "families.md"
        page.write_text(as_markdown(outcomes))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
