"""Model families of transformers, patched: loss, gradients, argmax and generate as with the plain
head, and no logits in training."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")

from families import families, run

# One of each way from hidden states to loss: plain, scaled, soft-capped, with a bias, tied, shifted
# by the loss function or by the model, experts, encoder and decoder, masked.
LAZY = [
    ("causal", "llama"), ("causal", "gpt2"), ("causal", "gemma2"), ("causal", "granite"),
    ("causal", "cohere"), ("causal", "phi"), ("causal", "gpt_neox"), ("causal", "mixtral"),
    ("causal", "mamba"), ("causal", "bert"), ("causal", "xlnet"), ("causal", "whisper"),
    ("seq2seq", "bart"), ("seq2seq", "t5"), ("masked", "bert"), ("masked", "roberta"),
    ("masked", "deberta-v2"),
]  # fmt: skip
# Correct, with a head that cannot be lazy.
PLAIN_HEAD = [("causal", "dory"), ("seq2seq", "fsmt"), ("masked", "mobilebert")]


@pytest.mark.parametrize(("kind", "model_type"), LAZY)
def test_family_is_lazy(kind: str, model_type: str) -> None:
    outcome = run(kind, model_type)
    if outcome.status == "not built" and "ImportError" in outcome.detail:
        pytest.skip(outcome.detail)
    assert outcome.status == "lazy", outcome


@pytest.mark.parametrize(("kind", "model_type"), PLAIN_HEAD)
def test_family_with_another_head(kind: str, model_type: str) -> None:
    if (kind, model_type) not in set(families()):
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    assert run(kind, model_type).status == "plain head"


def test_any_family(kind: str, model_type: str) -> None:
    """With --all-families. What does not build is for the page, docs/families.md."""
    outcome = run(kind, model_type)
    if outcome.status == "not built":
        pytest.skip(outcome.detail)
    assert outcome.status in ("lazy", "plain head", "computes logits"), outcome
