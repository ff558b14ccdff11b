"""LoRA on the head as well as on the attention (PEFT): W x + s B (A x) without logits.

An adapter on the head is easily lost where a loss is called by hand with the head's weight. Under
memeff.patch both products are one head, [W, s B] over [x; A x], and only A and B get gradients.
"""

import torch
from _compare import compare
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import memeff
from memeff.bench.corpus import Vocabulary, standard_library_text


def main(
    patched: bool = True, vocab: int = 32768, steps: int = 10, batch: int = 4, length: int = 256
) -> list[float]:
    """Trains adapters of a small random Llama; returns the loss of each step."""
    torch.manual_seed(0)
    text = standard_library_text(300_000)
    tokens = Vocabulary(text, vocab).encode(text)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "lm_head"])
    model = get_peft_model(LlamaForCausalLM(config), lora)
    report = memeff.patch(model) if patched else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=2e-2)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(tokens) - length, (batch,))
        windows = torch.stack([tokens[start : start + length] for start in starts.tolist()])
        loss = model(input_ids=windows, labels=windows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if report is not None:
        print(report)
    return losses


if __name__ == "__main__":
    compare(main)
