# What csrc/bindings/module.cpp defines. Importing it also registers torch.ops.memeff.*.

def add_tuned(
    rows: list[tuple[str, int, str, int, int, int, bool, str]], banned: list[tuple[str, str]]
) -> None: ...
def agree(group: str, facts: str, classes: int, memory_budget: int) -> tuple[int, int]: ...
def build_info() -> dict[str, str | None]: ...
def plan(
    tokens: int,
    features: int,
    vocab: int,
    dtype: str,
    backend: str,
    probabilities: bool,
    ranks: int,
    capability: int,
    gpu: str,
    multiprocessors: int,
    options: dict[str, object],
) -> dict[str, str | int | float]: ...
def report_failure(group: str, message: str) -> None: ...
