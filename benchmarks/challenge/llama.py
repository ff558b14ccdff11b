"""A Llama trained with the standard loss and with memeff's: the same losses, step by step."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import memeff
from challenge.functions import cross_entropy
from challenge.report import Row, row
from memeff import MemoryEfficientLinear
from memeff.bench.environment import installed_version


def llama(arguments: argparse.Namespace) -> list[Row]:
    name = "Llama-1B layout: training losses match"
    version = installed_version("transformers")
    if version is None:
        return [row(name, None, "transformers is not installed")]
    from transformers import LlamaConfig, LlamaForCausalLM

    from memeff.bench.corpus import Vocabulary, standard_library_text

    # Llama 3.2 1B: 16 layers, 2048 wide, 32 heads of which 8 for keys, 8192, 128256. Shrunk.
    config = LlamaConfig(
        vocab_size=8192, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, rope_theta=500000.0, tie_word_embeddings=True,
        max_position_embeddings=512,
    )  # fmt: skip
    text = standard_library_text(400_000)
    vocabulary = Vocabulary(text, config.vocab_size)
    tokens = vocabulary.encode(text) % config.vocab_size
    steps, batch, length = arguments.steps, 4, 64
    batches = tokens[: steps * batch * length].view(steps, batch, length)

    def train(loss_of: Callable[[Any, Tensor], Tensor]) -> Tensor:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for ids in batches:
            loss = loss_of(model, ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def standard(model: Any, ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    def function(model: Any, ids: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        weight = model.lm_head.weight
        return MemoryEfficientLinear.apply(
            hidden, weight, ids[:, 1:].contiguous(), cross_entropy, None, "mean", 37
        )

    def fused(model: Any, ids: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids).last_hidden_state
        return memeff.linear_cross_entropy(hidden, model.lm_head.weight, ids, shift=True)

    expected = train(standard)
    rows = []
    for variant, loss_of in (("MemoryEfficientLinear", function), ("linear_cross_entropy", fused)):
        losses = train(loss_of)
        worst = (losses - expected).abs().max().item()
        rows.append(
            row(
                f"{name} ({variant})",
                worst <= 1e-3,
                f"transformers {version}, {steps} steps in float32, largest difference "
                f"{worst:.1e}, loss from {expected[0]:.3f} to {expected[-1]:.3f}",
                worst=worst,
            )
        )
    return rows
