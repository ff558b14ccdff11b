"""First calls import no compiler: torch._dynamo takes seconds and 80 MB."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys, torch, torch.nn.functional as F, memeff
x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
y, head = torch.randint(5, (4,)), torch.nn.Linear(3, 5)
calls = {
    "linear_cross_entropy": lambda: memeff.linear_cross_entropy(x, w, y),
    "linear_token_statistics": lambda: memeff.linear_token_statistics(x, w, y).lse.sum(),
    "chunked_linear_apply": lambda: memeff.chunked_linear_apply(lambda z: z.exp().sum(), x, w),
    "MemoryEfficientLinear": lambda: memeff.MemoryEfficientLinear.apply(
        x, w, y, lambda x, linear, y: F.cross_entropy(linear(x), y)
    ),
    "linear_loss": lambda: memeff.linear_loss(lambda s: -s.logprob, x, w, y),
    "float16": lambda: memeff.linear_loss(lambda s: -s.logprob, x.half(), w.half(), y),
    "distillation": lambda: memeff.losses.linear_distillation_loss(x, w, 2 * x, w),
    "LinearCrossEntropyLoss": lambda: memeff.LinearCrossEntropyLoss(linear=head)(x, y),
    "patch": lambda: (memeff.patch(head), F.cross_entropy(head(x), y))[1],
}
for name, call in calls.items():
    call().backward()
    assert "torch._dynamo" not in sys.modules, name
"""


def test_first_calls_import_no_compiler() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)
