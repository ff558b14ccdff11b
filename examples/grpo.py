"""GRPO over a group of sampled sequences: log-probabilities without logits, the loss in PyTorch.

The reward is the share of even tokens, so the policy learns to prefer them.
"""

import torch

import memeff

GROUP, LENGTH, FEATURES, VOCAB = 8, 32, 32, 1000


def main(steps: int = 20) -> list[float]:
    """Returns minus the mean reward of the sequences sampled at each step."""
    torch.manual_seed(0)
    hidden = torch.randn(GROUP, LENGTH, FEATURES)  # of the policy's last layer, frozen here
    head = torch.nn.Linear(FEATURES, VOCAB, bias=False)
    reference = head.weight.detach().clone()
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-2)
    mask = torch.ones(GROUP, LENGTH)
    costs = []
    for _ in range(steps):
        with torch.no_grad():  # generation does look at logits
            tokens = head(hidden).softmax(-1).flatten(0, 1).multinomial(1).view(GROUP, LENGTH)
            old = memeff.linear_logprobs(hidden, head.weight, tokens)
            ref = memeff.linear_logprobs(hidden, reference, tokens)
        rewards = (tokens % 2 == 0).float().mean(1)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for _ in range(2):  # epochs over the same samples
            logprobs = memeff.linear_logprobs(hidden, head.weight, tokens)
            loss = memeff.losses.grpo_loss(
                logprobs, advantages, mask, old_logprobs=old, ref_logprobs=ref, beta=0.01
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        costs.append(-rewards.mean().item())
    return costs


if __name__ == "__main__":
    for step, cost in enumerate(main()):
        print(f"step {step:2}   mean reward {-cost:.3f}")
