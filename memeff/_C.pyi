# What csrc/bindings/module.cpp defines. Importing it also registers torch.ops.memeff.*.

def build_info() -> dict[str, str | None]: ...
def plan(
    tokens: int,
    features: int,
    vocab: int,
    dtype: str,
    backend: str,
    reduction: str,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    probabilities: bool,
    label_smoothing: float,
    softcap: float,
    statistics: bool,
    skip_mass: float,
    memory_budget: int,
    chunk_size: int,
    grad_accumulation: str,
    capability: int,
    gpu: str,
    multiprocessors: int,
) -> dict[str, str | int | float]: ...
