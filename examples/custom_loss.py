"""Two losses of your own, neither of which memeff knows.

`confident` needs a few numbers per token, so linear_loss computes it in one pass with the
handwritten kernels. `margin` looks at whole rows of logits, so chunked_linear_apply gives it these,
a chunk of tokens at a time.
"""

import torch

import memeff

TOKENS, FEATURES, VOCAB = 256, 64, 4000


def confident(statistics: memeff.LogitStatistics, weight: torch.Tensor) -> torch.Tensor:
    """Weighted cross entropy with a penalty on entropy; statistics and weight of c tokens, [c]."""
    return weight * (0.1 * statistics.entropy - statistics.logprob)


def margin(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Hinge loss of each token, [c]: the target's logit [c, V] should lead the best other by 1."""
    chosen = logits.gather(1, target[:, None])
    others = logits.scatter(1, target[:, None], -torch.inf).amax(1)
    return (1 + others - chosen[:, 0]).clamp(min=0)


def main(steps: int = 20) -> list[float]:
    """Minimises the sum of both; returns its value at each step."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, FEATURES, requires_grad=True)
    head = torch.nn.Linear(FEATURES, VOCAB, bias=False)
    target, weight = torch.randint(VOCAB, (TOKENS,)), torch.rand(TOKENS)
    optimizer = torch.optim.Adam([hidden, head.weight], lr=1e-2)
    losses = []
    for _ in range(steps):
        first = memeff.linear_loss(confident, hidden, head.weight, target, weight, entropy=True)
        second = memeff.chunked_linear_apply(margin, hidden, head.weight, target).mean()
        loss = first + second
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for step, loss in enumerate(main()):
        print(f"step {step:2}   loss {loss:.4f}")
