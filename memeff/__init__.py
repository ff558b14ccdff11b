"""Linear cross entropy without storing logits.

Public names are loaded on first use: ``import memeff`` imports neither torch nor the extension.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
    from memeff import losses as losses
    from memeff import reference as reference
    from memeff.bench.tuning import Tuning as Tuning
    from memeff.bench.tuning import tune as tune
    from memeff.chunked import chunked_linear_apply as chunked_linear_apply
    from memeff.functional import linear_cross_entropy as linear_cross_entropy
    from memeff.fused_loss import linear_loss as linear_loss
    from memeff.label_shards import shift_labels as shift_labels
    from memeff.lazy.patching import patch as patch
    from memeff.lazy.patching import unpatch as unpatch
    from memeff.memory_efficient_linear import MemoryEfficientLinear as MemoryEfficientLinear
    from memeff.modules import LinearCrossEntropyLoss as LinearCrossEntropyLoss
    from memeff.planning import Plan as Plan
    from memeff.planning import plan as plan
    from memeff.statistics import LogitStatistics as LogitStatistics
    from memeff.statistics import TokenStatistics as TokenStatistics
    from memeff.token_statistics import linear_logprobs as linear_logprobs
    from memeff.token_statistics import linear_token_statistics as linear_token_statistics
    from memeff.vocab_parallel import VocabParallel as VocabParallel

# Public name -> module that defines it. No module here is called like a public name of another
# kind: importing memeff.x would put the module in its place. Hence "planning".
_HOMES = {
    "LinearCrossEntropyLoss": "memeff.modules",
    "LogitStatistics": "memeff.statistics",
    "MemoryEfficientLinear": "memeff.memory_efficient_linear",
    "Plan": "memeff.planning",
    "TokenStatistics": "memeff.statistics",
    "Tuning": "memeff.bench.tuning",
    "VocabParallel": "memeff.vocab_parallel",
    "chunked_linear_apply": "memeff.chunked",
    "linear_cross_entropy": "memeff.functional",
    "linear_loss": "memeff.fused_loss",
    "linear_logprobs": "memeff.token_statistics",
    "linear_token_statistics": "memeff.token_statistics",
    "patch": "memeff.lazy.patching",
    "plan": "memeff.planning",
    "shift_labels": "memeff.label_shards",
    "tune": "memeff.bench.tuning",
    "unpatch": "memeff.lazy.patching",
}

__all__ = [
    "LinearCrossEntropyLoss",
    "LogitStatistics",
    "MemoryEfficientLinear",
    "Plan",
    "TokenStatistics",
    "Tuning",
    "VocabParallel",
    "chunked_linear_apply",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_loss",
    "linear_token_statistics",
    "losses",
    "patch",
    "plan",
    "reference",
    "shift_labels",
    "tune",
    "unpatch",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.metadata.version("memeff")
    if name in ("losses", "reference"):
        return importlib.import_module(f"memeff.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'memeff' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
