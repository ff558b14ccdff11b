"""TRL's GRPO on memeff: its loss needs log-probabilities and entropies, and no logits.

A small random model learns to write digits, its reward the share of digits in what it wrote. For
TRL's trainers the line is memeff.integrations.trl.patch(), which puts memeff under their own fused
head; generation stays what it is.
"""

import tempfile

import torch
from _compare import compare
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer

import memeff.integrations.trl
from memeff.bench.corpus import split_pieces, standard_library_text


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Words of Python's standard library, nothing trained or downloaded."""
    words = dict.fromkeys(piece.strip() for piece in split_pieces(standard_library_text(300_000)))
    special = ["<pad>", "<eos>", "<unk>", *"0123456789"]
    listed = list(dict.fromkeys([*special, *(word for word in words if word)]))[:vocab]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(listed)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def share_of_digits(completions: list[str], **_: object) -> list[float]:
    words = [completion.split() for completion in completions]
    return [sum(word.isdigit() for word in some) / max(1, len(some)) for some in words]


def main(
    patched: bool = True, vocab: int = 16384, steps: int = 4, batch: int = 8, length: int = 16
) -> list[float]:
    """Trains for `steps` steps; returns the loss of each, which is near 0 in GRPO."""
    set_seed(0)
    if patched:
        memeff.integrations.trl.patch()
    tokenizer = make_tokenizer(vocab)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=LlamaForCausalLM(config),
            reward_funcs=share_of_digits,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": ["import os", "return self", "if not"] * 8}),
            args=GRPOConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=batch,
                num_generations=batch,
                max_completion_length=length,
                learning_rate=1e-3,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                bf16=False,
                use_cpu=not torch.cuda.is_available(),
            ),
        )
        trainer.train()
    if patched:
        memeff.integrations.trl.unpatch()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    compare(main)
