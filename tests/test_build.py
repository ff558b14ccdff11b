"""The build: what is compiled, what the extension knows about itself, and what users are told."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest
import torch

from buildtools.config import BuildConfig
from buildtools.cuda_archs import parse_archs
from buildtools.ninja_objects import object_path
from buildtools.sources import ROOT, Source, find_sources
from memeff import _library, diagnostics


def run_python(*arguments: str, interpreter: str = sys.executable) -> subprocess.CompletedProcess:
    return subprocess.run(
        [interpreter, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


class TestBuildInfo:
    def test_names_the_running_torch(self):
        info = _library.load().build_info()
        assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]

    def test_names_compiler_flags_and_kernels(self):
        info = _library.load().build_info()
        assert re.search(r"\d+\.\d+", info["compiler"])
        assert "-O" in info["flags"]
        assert (info["cuda"] is None) == (info["cuda_archs"] is None)
        if info["cuda"] is not None:
            assert re.fullmatch(r"\d+\.\d+", info["cuda"])
            assert parse_archs(info["cuda_archs"].replace(" ", ";"))

    def test_torch_version_is_readable_from_the_file(self):
        assert _library.built_torch_version() == _library.load().build_info()["torch"]

    def test_importing_registers_the_operators(self):
        _library.load()
        for name in ("forward", "backward"):
            assert hasattr(torch.ops.memeff, f"linear_cross_entropy_{name}")


class TestLoadingFailures:
    def test_not_built(self, monkeypatch):
        monkeypatch.setattr(_library, "extension_file", lambda: None)
        message = _library.explain_failure(ImportError("no module"))
        assert "not built" in message
        assert "pip install" in message

    def test_other_torch(self, monkeypatch):
        monkeypatch.setattr(_library, "built_torch_version", lambda: "1.13.1+cpu")
        message = _library.explain_failure(ImportError("undefined symbol"))
        assert "1.13.1+cpu" in message
        assert torch.__version__ in message
        assert "pip install" in message

    def test_other_reason_is_passed_on(self):
        assert "libfoo.so" in _library.explain_failure(ImportError("libfoo.so: cannot open"))

    @pytest.mark.parametrize(
        ("built", "running", "same"),
        [
            ("2.13.0+cpu", "2.13.1+cu130", True),
            ("2.11.0", "2.13.0", False),
            ("2.1.0", "2.11.0", False),
        ],
    )
    def test_versions_compare_by_major_and_minor(self, built, running, same):
        assert _library.same_minor_version(built, running) is same


class TestDiagnostics:
    def test_nothing_missing_here(self, capsys):
        assert diagnostics.main() == 0
        printed = capsys.readouterr().out
        assert torch.__version__ in printed
        assert "Nothing is missing" in printed
        assert "CUDA kernels for scores, products" in printed

    def test_works_when_the_extension_does_not_load(self):
        # None in sys.modules makes the import fail as a missing module does.
        answer = run_python(
            "-c",
            "import sys, runpy; sys.modules['memeff._C'] = None\n"
            "runpy.run_module('memeff.diagnostics', run_name='__main__')",
        )
        assert answer.returncode == 1, answer.stderr
        assert "Missing" in answer.stdout
        assert "pip install" in answer.stdout


class TestGpuDiagnostics:
    """What is said on a machine with a GPU, played to machines without."""

    def gpu(self, monkeypatch, capability, cuda, archs):
        info = {**_library.load().build_info(), "cuda": cuda, "cuda_archs": archs}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        extension = types.SimpleNamespace(build_info=lambda: info)
        monkeypatch.setattr(_library, "load", lambda: extension)
        return diagnostics.problems()

    def test_built_for_it(self, monkeypatch):
        assert self.gpu(monkeypatch, (9, 0), "13.0", "80 90+PTX 90a") == []

    def test_built_without_cuda(self, monkeypatch):
        *_, problem = self.gpu(monkeypatch, (9, 0), None, None)
        assert "without its CUDA kernels" in problem
        assert "MEMEFF_CUDA=1 pip install" in problem

    def test_built_for_another(self, monkeypatch):
        (problem,) = self.gpu(monkeypatch, (8, 6), "13.0", "90 90a")
        assert "cuda:0" in problem
        assert "sm_86" in problem
        assert "MEMEFF_CUDA_ARCHS=86" in problem

    def test_too_old(self, monkeypatch):
        (problem,) = self.gpu(monkeypatch, (7, 0), "13.0", "75 80")
        assert "need sm_75" in problem

    @pytest.mark.parametrize(
        ("arch", "capability", "runs"),
        [
            ("80", (8, 6), True),
            ("86", (8, 0), False),
            ("80", (9, 0), False),
            ("90a", (9, 0), True),
            ("100f", (10, 3), True),
            ("100f", (12, 0), False),
            ("90+PTX", (12, 0), True),
            ("90+PTX", (8, 9), False),
        ],
    )
    def test_which_code_runs_where(self, arch, capability, runs):
        assert diagnostics.runs_on(arch, capability) is runs

    def test_the_page_says_which_code_runs_where(self):
        """docs/kernels.md, against the compiler's options for a build for all GPUs."""
        rules = json.loads((ROOT / "buildtools" / "sources.json").read_text())["rows"]
        archs = {
            rule["pattern"].split("/")[2]: rule["archs"]
            for rule in rules
            if rule["pattern"].endswith("*.cu")
        }

        def code(family, capability):
            if any(diagnostics.runs_on(a.removesuffix("+PTX"), capability) for a in archs[family]):
                return "SASS"
            return "PTX" if any(diagnostics.runs_on(a, capability) for a in archs[family]) else "-"

        page = (ROOT / "docs" / "kernels.md").read_text()
        _, _, table = page.partition("| GPU | compute capability |")
        head, _, *rows = table.partition("\n\n")[0].splitlines()
        families = re.findall(r"`(\w+)`", head)
        assert families == list(archs)
        for row in rows:
            _, number, *said = (cell.strip() for cell in row.strip("|").split("|"))
            capability = tuple(map(int, number.split(".")))
            assert said == [code(family, capability) for family in families], row
        assert len(rows) > 8


class TestTorchOfTheEnvironment:
    HOOK = "import buildtools.backend as backend; backend.get_requires_for_build_wheel()"

    def test_message_without_torch(self, tmp_path):
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True
        )
        answer = run_python(
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); {self.HOOK}",
            interpreter=str(tmp_path / "bare" / "bin" / "python"),
        )
        assert answer.returncode == 1
        assert "pip install torch" in answer.stderr
        assert "Traceback" not in answer.stderr
        assert len(answer.stderr.strip().splitlines()) <= 4

    def test_found_behind_build_isolation(self, tmp_path):
        # As pip does it: a sitecustomize on PYTHONPATH that hides the environment's own packages.
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\nsys.path = [p for p in sys.path if 'site-packages' not in p]\n"
        )
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "import importlib.util; assert importlib.util.find_spec('torch') is None\n"
            f"{self.HOOK}\n"
            "import torch; print(torch.__file__)"
        )
        answer = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.stdout.strip() == torch.__file__, answer.stderr


class TestSwitches:
    def test_debug_and_werror(self):
        config = BuildConfig.from_environment({"MEMEFF_DEBUG": "1", "MEMEFF_WERROR": "1"})
        assert {"-O0", "-Werror"} <= set(config.cxx_flags)
        assert "-O3" not in config.cxx_flags

    def test_jobs(self):
        assert BuildConfig.from_environment({"MAX_JOBS": "3"}).jobs == 3
        assert BuildConfig.from_environment({}).jobs >= 1

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("MAX_JOBS", "0"),
            ("MAX_JOBS", "many"),
            ("MEMEFF_DEBUG", "yes"),
            ("MEMEFF_CUDA", "on"),
            ("MEMEFF_CUDA_ARCHS", "9.0"),
            ("MEMEFF_NVCC_THREADS", "all"),
        ],
    )
    def test_meaningless_value_is_named(self, name, value):
        with pytest.raises(SystemExit, match=f"{name}='{value}'"):
            BuildConfig.from_environment({name: value})

    def test_cuda(self):
        assert BuildConfig.from_environment({}).cuda is None
        assert BuildConfig.from_environment({"MEMEFF_CUDA": "0"}).cuda is False
        config = BuildConfig.from_environment(
            {"MEMEFF_CUDA": "1", "MEMEFF_CUDA_ARCHS": "80;90a", "MEMEFF_LINEINFO": "1"}
        )
        assert config.cuda is True
        assert [str(arch) for arch in config.cuda_archs] == ["80", "90a"]
        assert "-lineinfo" in config.nvcc_flags


class TestSources:
    def test_every_source_is_in_the_build(self):
        paths = {source.path for source in find_sources()}
        on_disk = {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / "csrc").rglob("*")
            if path.suffix in (".c", ".cc", ".cpp", ".cxx", ".cu")
        }
        assert paths == on_disk

    def test_a_source_outside_the_table_is_named(self, tmp_path):
        (tmp_path / "csrc" / "elsewhere").mkdir(parents=True)
        (tmp_path / "csrc" / "elsewhere" / "new.cpp").touch()
        with pytest.raises(SystemExit, match=r"csrc/elsewhere/new\.cpp"):
            find_sources(tmp_path)

    def test_vector_flags_by_name_and_processor(self, tmp_path):
        (tmp_path / "csrc" / "cpu").mkdir(parents=True)
        for name in ("rows", "rows_avx2", "rows_avx512", "rows_avx512bf16", "rows_torch"):
            (tmp_path / "csrc" / "cpu" / f"{name}.cpp").touch()
        flags = {Path(s.path).stem: s.flags for s in find_sources(tmp_path, "x86_64")}
        assert "-mavx2" in flags["rows_avx2"]
        assert "-mavx512f" in flags["rows_avx512"]
        assert "-mavx512bf16" not in flags["rows_avx512"]
        assert "-mavx512bf16" in flags["rows_avx512bf16"]
        assert flags["rows"] == flags["rows_torch"] == ()
        assert not any(source.flags for source in find_sources(tmp_path, "aarch64"))

    def test_torch_headers_only_where_the_table_says(self):
        for source in find_sources():
            text = (ROOT / source.path).read_text()
            if source.toolchain not in ("torch", "included"):
                assert not re.search(r"#include <(torch|ATen|c10|pybind11)/", text), source.path

    def test_what_is_included_is_included_once(self):
        sources = find_sources()
        texts = [(ROOT / s.path).read_text() for s in sources if s.toolchain == "torch"]
        for path in (s.path for s in sources if s.toolchain == "included"):
            line = f'#include "{path.removeprefix("csrc/")}"'
            assert sum(line in text for text in texts) == 1, path

    @pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
    def test_vector_code_does_not_leak(self):
        """No inline function is defined in objects of different instruction sets.

        The linker keeps one copy for the whole library: code for one processor would run on all.
        """
        folder = ROOT / "build" / f"{sys.implementation.cache_tag}-release" / "torch-free"
        if not folder.exists():
            pytest.skip("memeff was not built in this folder")
        sources = [s for s in find_sources() if s.toolchain == "cxx" and not s.needs_cuda]
        shared = {source: _shared_functions(folder, source) for source in sources}
        for a, b in itertools.combinations(sources, 2):
            if a.flags != b.flags:
                assert not shared[a] & shared[b], f"{a.path} and {b.path}"


class TestDistribution:
    def test_it_has_every_file_of_the_repository(self, tmp_path):
        """So that what it holds builds, and its tests find all that they read."""
        listed = subprocess.run(
            ["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=False
        )
        if listed.returncode != 0:
            pytest.skip("not a git checkout")
        files = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
        source = tmp_path / "source"
        for name in files:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
        code = "import buildtools.backend as backend; backend.build_sdist('dist')"
        subprocess.run(
            [sys.executable, "-c", code], cwd=source, stdout=subprocess.DEVNULL, check=True
        )
        (archive,) = (source / "dist").glob("memeff-*.tar.gz")
        with tarfile.open(archive) as tar:
            members = {m.name.partition("/")[2] for m in tar.getmembers() if m.isfile()}
        assert files - members == set()
        made = {"PKG-INFO", "setup.cfg"}
        assert {name for name in members - files - made if "egg-info/" not in name} == set()

    def test_its_version_is_the_changelog_s_first(self):
        version = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.M)
        newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
        assert version[1].partition(".dev")[0] == newest[1]

    def test_pre_commit_uses_the_versions_of_lint(self):
        pinned = re.findall(
            r'"((?:ruff|clang-format)==[^"]+)"', (ROOT / "pyproject.toml").read_text()
        )
        hooks = (ROOT / ".pre-commit-config.yaml").read_text()
        assert set(re.findall(r"\[(\S+==\S+)\]", hooks)) == set(pinned)


def _shared_functions(folder: Path, source: Source) -> set[str]:
    """Names of the functions in an object that the linker merges with those of other objects."""
    answer = subprocess.run(
        ["nm", "--demangle", "--defined-only", object_path(folder, source)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (line.split(maxsplit=2) for line in answer.stdout.splitlines())
    return {name for _, kind, name in lines if kind == "W"}
