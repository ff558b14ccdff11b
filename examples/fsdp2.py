"""FSDP2 (fully_shard) with two processes on this CPU; on GPUs only the backend changes.

    python examples/fsdp2.py                              both ways, by torchrun
    torchrun --nproc-per-node 2 examples/fsdp2.py memeff  one of them

Patch the model before it is sharded. The loss may be computed outside of the model's forward: the
lazy logits have FSDP gather the head's weight when they need it.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _compare import compare
from torch import nn
from torch.distributed.fsdp import fully_shard

import memeff
from memeff.bench.corpus import Vocabulary, standard_library_text


class Model(nn.Module):
    def __init__(self, vocab: int, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, features)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                features, 4, 2 * features, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.head = nn.Linear(features, vocab, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(x)


def main(
    patched: bool = True, vocab: int = 32768, steps: int = 10, batch: int = 4, length: int = 128
) -> list[float]:
    """Trains in every process; returns the mean loss of each step."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    text = standard_library_text(300_000)
    tokens = Vocabulary(text, vocab).encode(text)
    torch.manual_seed(0)  # the same model everywhere
    model = Model(vocab, 128)
    if patched:
        memeff.patch(model)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    torch.manual_seed(dist.get_rank())  # other text everywhere
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(tokens) - length, (batch,))
        windows = torch.stack([tokens[start : start + length] for start in starts.tolist()])
        logits = model(windows)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    compare(main, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])
