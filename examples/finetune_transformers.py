"""Hugging Face's Trainer with a patched model: nothing else of the script changes.

A small random Llama learns Python's standard library. For a model of yours replace `make_model`
by AutoModelForCausalLM.from_pretrained(...), and the text by your data set.
"""

import tempfile

import torch
from _compare import compare
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import memeff
from memeff.bench.corpus import Vocabulary, standard_library_text


def make_model(vocab: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def main(
    patched: bool = True, vocab: int = 32768, steps: int = 10, batch: int = 4, length: int = 256
) -> list[float]:
    """Trains for `steps` steps of two micro-batches; returns the loss of each step."""
    set_seed(0)
    text = standard_library_text(300_000)
    tokens = Vocabulary(text, vocab).encode(text)
    model = make_model(vocab)
    if patched:
        memeff.patch(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=2,
                learning_rate=3e-3,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=[
                {"input_ids": window, "labels": window}
                for window in tokens[: len(tokens) // length * length].split(length)
            ],
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    compare(main)
