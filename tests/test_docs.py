"""README.md and docs/: every snippet runs, every link to the project leads somewhere.

The Python snippets of a page run in order, in one namespace. One behind `<!-- needs: package -->`
has a test of its own here, which is skipped where the package is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

import memeff
from buildtools.sources import ROOT

REPOSITORY = "https://github.com/memeff/memeff"
SITE = "https://memeff.github.io/memeff/"
SNIPPET = re.compile(
    r"(?:^<!-- needs: (?P<needs>\w+) -->\n)?^```python\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages that are part of the site by inclusion.
PAGES += [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
PAGES += [ROOT / "tests" / name / "README.md" for name in ("emulator", "kernels")]
PAGES += [ROOT / "examples" / "README.md"]
WITH_SNIPPETS = {
    "README.md": 3,
    "docs/quickstart.md": 3,
    "docs/plans.md": 1,
    "docs/losses.md": 14,
    "docs/integrations.md": 4,
}


def snippets(page: Path, needs: str | None = None) -> list[str]:
    """The snippets of a page that need `needs`, most often a package, or, for None, nothing."""
    return [m["code"] for m in SNIPPET.finditer(page.read_text()) if m["needs"] == needs]


def run(page: Path, codes: list[str], namespace: dict[str, Any]) -> dict[str, Any]:
    for code in codes:
        exec(compile(code, str(page), "exec"), namespace)
    return namespace


def check(namespace: dict[str, Any], gradients: tuple[str, ...], scalars: tuple[str, ...]) -> None:
    for name in gradients:
        gradient = namespace[name].grad
        assert gradient is not None and gradient.isfinite().all(), name
    for name in scalars:
        value = namespace[name]
        assert isinstance(value, torch.Tensor) and value.dim() == 0 and value.isfinite(), name


@pytest.mark.parametrize("name", WITH_SNIPPETS)
def test_snippets_run(name: str) -> None:
    codes = snippets(ROOT / name)
    assert len(codes) >= WITH_SNIPPETS[name]
    namespace = run(ROOT / name, codes, {})
    if name == "docs/integrations.md":
        check(namespace, (), ("loss",))
        check_report(namespace)
        return
    check(namespace, ("hidden",), ())
    if name == "docs/losses.md":
        scalars = ("gspo", "ppo", "dpo", "orpo", "simpo", "cpo", "kto", "focal", "smooth", "loss")
        check(namespace, ("weight", "scale"), scalars)


def test_no_page_with_snippets_is_left_out() -> None:
    pages = {page.relative_to(ROOT).as_posix() for page in PAGES if snippets(page)}
    assert pages == set(WITH_SNIPPETS)


def test_the_reference_has_every_public_name() -> None:
    listed = re.findall(
        r"^::: memeff\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(memeff.__all__)


def test_the_first_screen_has_all_that_a_beginner_needs() -> None:
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:60])
    for part in ("pip install", "memeff.patch(model)", "memeff.linear_cross_entropy(", "Status"):
        assert part in first


def test_readme_trains_a_hugging_face_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snippet as it stands, with a tiny random model in place of the download."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    model = tiny_llama(transformers).bfloat16()
    before = model.lm_head.weight.detach().clone()
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_args, **_options: model
    )
    ids = torch.randint(512, (4, 16))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, disable_tqdm=True, learning_rate=0.1,
    )  # fmt: skip
    dataset = [{"input_ids": row, "labels": row} for row in ids]
    (code,) = snippets(ROOT / "README.md", needs="transformers")
    namespace = {"training_args": arguments, "dataset": dataset}
    run(ROOT / "README.md", [code], namespace)
    assert not torch.equal(model.lm_head.weight, before)
    assert type(model.lm_head) is not torch.nn.Linear  # patched


def check_report(namespace: dict[str, Any]) -> None:
    trained = [p for p in namespace["model"].parameters() if p.requires_grad]
    assert trained and all(p.grad is None or p.grad.isfinite().all() for p in trained)
    report = namespace["report"]
    assert report.without_logits["cross_entropy"] and not report.materialised


def tiny_llama(transformers: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("package", ["transformers", "peft", "accelerate", "lightning"])
def test_snippets_of_integrations(package: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pytest.importorskip(package)
    ids = torch.randint(512, (2, 16))
    namespace = {
        "torch": torch,
        "memeff": memeff,
        "model": tiny_llama(transformers),
        "ids": ids,
        "Trainer": transformers.Trainer,
        "training_args": transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[],
            use_cpu=True, disable_tqdm=True,
        ),
        "dataset": [{"input_ids": row, "labels": row} for row in ids],
    }  # fmt: skip
    page = ROOT / "docs" / "integrations.md"
    (code,) = snippets(page, needs=package)
    run(page, [code], namespace)
    if package == "lightning":
        lightning = namespace["lightning"]
        module = namespace["Module"](namespace["model"])
        trainer = lightning.Trainer(
            max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(ids, batch_size=2))
        namespace["report"] = module.report
    check_report(namespace)


def test_snippet_of_trl() -> None:
    pytest.importorskip("trl")
    import trl.trainer.utils

    before = trl.trainer.utils._ChunkedLogProbFunction
    page = ROOT / "docs" / "integrations.md"
    namespace = run(page, snippets(page, needs="trl"), {})
    try:
        assert trl.trainer.utils._ChunkedLogProbFunction is not before
    finally:
        namespace["memeff"].integrations.trl.unpatch()


# What the snippets of several processes start from, in a process of their own: a group of one.
PROCESS = """
import os, sys
import torch, torch.distributed as dist, torch.nn.functional as F
import memeff

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
store = f"file://{sys.argv[1]}/rendezvous"
dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(100, 16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))
        self.head = torch.nn.Linear(16, 100)

    def forward(self, ids, labels=None):
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        logits = self.head(x)
        if labels is None:
            return logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

ds_config = {
    "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
}
if "deepspeed" in sys.argv[2]:
    import deepspeed
    # Its own kernels in place of gloo's would be compiled first, which takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
for code in sys.argv[2:]:
    names = {"torch": torch, "F": F, "memeff": memeff, "model": Model(), "ds_config": ds_config}
    names |= {"ids": torch.randint(100, (2, 8)), "device": torch.device("cpu")}
    exec(code, names)
    report = names["report"]
    assert report.without_logits["cross_entropy"] == 1 and not report.materialised, report
dist.destroy_process_group()
print("all ran")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("needs", "count"), [("process_group", 3), ("deepspeed", 1)])
def test_snippets_of_several_processes(needs: str, count: int, tmp_path: Path) -> None:
    if needs == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    codes = snippets(ROOT / "docs" / "integrations.md", needs=needs)
    assert len(codes) == count
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(tmp_path), *codes],
        capture_output=True, text=True, timeout=240, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0 and "all ran" in done.stdout, done.stderr[-3000:]


def measured(file: str) -> dict[str, dict[str, Any]]:
    """Variant -> figures of a committed result."""
    runs = json.loads((ROOT / "benchmarks" / "results" / file).read_text())["runs"]
    return {variant["name"]: variant for variant in runs[0]["variants"]}


def over_gradients(figures: dict[str, Any]) -> str:
    return f"{figures['over_gradients_bytes'] / 2**20:.0f}"


def test_the_figures_of_readme_are_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    results = measured("cpu-zen4-2core-bf16-4096x1024x32768.json")
    rows = re.findall(r"^\| (?:\*\*)?`([^`]+)`[^|]*\| (\d.*) \|$", text, re.MULTILINE)
    assert 4 <= len(rows) <= 6
    for name, cells in rows:
        figures = results[name]
        errors = (f"{figures['errors'][part]:.1e}" for part in ("loss", "dx", "dw"))
        time = (f"{figures['median_s'] * 1e3:.0f}", f"{figures['floor_ratio']:.2f}")
        assert cells.split(" | ") == [*time, over_gradients(figures), *errors], name
    head = measured("cpu-zen4-2core-bf16-2048x2048x128256.json")
    ours, standard = (over_gradients(head[name]) for name in ("memeff", "standard"))
    assert f"take {ours} MiB in addition to the gradients" in text
    assert f"takes {standard} MiB" in text


def test_the_table_of_benchmarks_is_committed_results() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    names = re.findall(r"`([^`]+)`", re.findall(r"^\| N, D, V, dtype.*$", text, re.MULTILINE)[0])
    rows = re.findall(r"^\| (\d+), (\d+), (\d+), (\w+) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 4
    for n, d, v, dtype, cells in rows:
        file = f"cpu-zen4-2core-{dtype}-{n}x{d}x{v}"
        results = measured(f"{file}.json")
        if (ROOT / "benchmarks" / "results" / f"{file}-budget.json").exists():
            results |= measured(f"{file}-budget.json")  # newer
        for name, cell in zip(names, cells.split(" | "), strict=True):
            figures = results.get(name)
            ratio = figures and f"{figures['floor_ratio']:.2f}, {over_gradients(figures)}"
            assert cell == (ratio or "-"), (file, name)


def test_the_figures_of_a_training_step_are_committed_results() -> None:
    file = ROOT / "benchmarks" / "results" / "step-cpu-avx2-fp32-llama-3.2-1b.json"
    (run,) = json.loads(file.read_text())["runs"]
    table = re.search(r"\| step \|.*?\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    assert table
    rows = dict(re.findall(r"^\| \**([a-z. ]+)[^|]*\| (\d.*) \|$", table[0], re.MULTILINE))
    summary = (ROOT / "benchmarks" / "README.md").read_text()
    for name, figures in run["variants"].items():
        seconds = f"{median(figures['seconds']):.1f}"
        over_state = f"{(figures['peak'] - figures['state']) / 2**20:.0f}"
        assert rows.pop(name) == f"{seconds} | {over_state}", name
        assert re.search(rf"{seconds} s and {over_state} MiB", summary), name
    assert not rows


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_the_project_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        address, _, _anchor = link.partition("#")
        if address.startswith(REPOSITORY):
            path = re.fullmatch(rf"{REPOSITORY}(?:/(?:blob|tree)/main/(.+))?", address)
            assert path and (ROOT / (path[1] or ".")).exists(), link
        elif address.startswith(SITE):
            name = address.removeprefix(SITE).strip("/") or "index"
            assert (ROOT / "docs" / f"{name}.md").exists(), link
        elif not address.startswith("http"):
            # Relative links are for pages of docs/, which mkdocs checks, too.
            assert page.parent == ROOT / "docs" and (page.parent / address).exists(), link
