"""A small student learns from a wider teacher, by the Jensen-Shannon divergence of their softmaxes.

The two heads have different widths and the same vocabulary; neither's [N, V] logits are stored.
"""

import torch

import memeff

TOKENS, STUDENT, TEACHER, VOCAB = 256, 32, 96, 2000


def main(steps: int = 20) -> list[float]:
    """Returns the loss of each step."""
    torch.manual_seed(0)
    teacher_hidden = torch.randn(TOKENS, TEACHER)
    teacher_weight = torch.randn(VOCAB, TEACHER) / TEACHER**0.5 * 3
    body = torch.nn.Linear(TEACHER, STUDENT)  # in place of the student's layers
    head = torch.nn.Linear(STUDENT, VOCAB, bias=False)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = memeff.losses.linear_distillation_loss(
            body(teacher_hidden), head.weight, teacher_hidden, teacher_weight, beta=0.5,
            temperature=2.0,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for step, loss in enumerate(main()):
        print(f"step {step:2}   loss {loss:.4f}")
