"""The scripts' own logic, without nvcc and without a GPU."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from buildtools.cuda_archs import Arch
from buildtools.sources import ROOT
from memeff.bench import choices

sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "kernels")]

import measured_choices
import mutate
import ptxas_report
import verify_gpu
from verify_gpu import Results, Step

PTX = """
.extern .shared .align 1024 .b8 memory[];
.visible .global .align 4 .u32 memeff_dynamic_shared = 49152;
.entry _Z4tilePf(
\t.param .u64 _Z4tilePf_param_0
)
.maxntid 256, 1, 1
.minnctapersm 2
{
\tmov.u32 %r1, memory;
}
.entry _Z5plainPf(
\t.param .u64 _Z5plainPf_param_0
)
{
\tret;
}
"""
SASS = """\
\t.section\t.text._Z4tilePf,"ax",@progbits
//--------------------- .text._Z4tilePf             --------------------------
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_3:
        /*0a10*/              @!P0 UTMALDG.2D [UR8], [UR4], desc[UR6] ;
        /*0a20*/             @!UP1 HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
//--------------------- .text._Z5plainPf            --------------------------
        /*0000*/                   EXIT ;  // HGMMA in a comment
"""
PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4tilePf' for 'sm_80'
ptxas info    : Function properties for _Z4tilePf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function '_Z5plainPf' for 'sm_80'
ptxas info    : Function properties for _Z5plainPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""


class TestPtxasReport:
    def test_launch_bounds_and_dynamic_shared_memory(self):
        assert ptxas_report.parse_ptx(PTX) == {"_Z4tilePf": (256, 49152), "_Z5plainPf": (None, 0)}

    def test_registers_shared_memory_spills(self):
        assert ptxas_report.parse_ptxas(PTXAS) == {
            "_Z4tilePf": (128, 1024, 16),
            "_Z5plainPf": (32, 0, 0),
        }

    @pytest.mark.parametrize(
        ("arch", "threads", "registers", "shared", "blocks"),
        [
            (80, 256, 32, 0, 8),  # all 64 warps
            (80, 256, 128, 0, 2),  # registers: 512 threads
            (80, 256, 129, 0, 1),  # 136 after rounding: 481 threads
            (80, 128, 168, 0, 3),
            (80, 128, 32, 49152, 3),  # 164 KiB / (48 + 1 KiB)
            (86, 128, 32, 49152, 2),
            (75, 128, 32, 32768, 2),
            (90, 384, 168, 229568, 1),
            (80, 32, 16, 0, 32),  # as many blocks as there may be
            (86, 32, 16, 0, 16),
            (80, 1024, 64, 170000, 0),  # does not fit at all
        ],
    )
    def test_occupancy(self, arch, threads, registers, shared, blocks):
        limits = ptxas_report.LIMITS[arch]
        assert blocks == ptxas_report.blocks_per_multiprocessor(
            limits, threads=threads, registers=registers, shared_bytes=shared
        )

    def test_every_architecture_of_the_table_has_limits(self):
        archs = {arch.number for s in ptxas_report.find_sources() for arch in s.archs}
        assert archs
        assert archs <= ptxas_report.LIMITS.keys()

    @pytest.mark.parametrize(
        ("demangled", "short"),
        [
            (
                "void memeff::cuda::(anonymous namespace)::rows_kernel<__nv_bfloat16, (bool)1, "
                "(int)8>(memeff::cuda::Block, float*)",
                "rows<bf16, true, 8>",
            ),
            ("memeff::cuda::sm80::plain_kernel(int*)", "plain"),
        ],
    )
    def test_names(self, demangled, short):
        assert ptxas_report.short_name(demangled) == short

    def test_opcodes(self):
        assert ptxas_report.parse_sass(SASS) == {
            "_Z4tilePf": {"LDC", "UTMALDG", "HGMMA"},
            "_Z5plainPf": {"EXIT"},
        }

    def test_every_family_says_what_it_needs(self):
        families = {
            source.path.split("/")[2]
            for source in ptxas_report.find_sources()
            if source.toolchain == "cuda"
        }
        assert families == ptxas_report.INSTRUCTIONS.keys() == ptxas_report.DYNAMIC_SHARED.keys()

    def toolkit(self):
        toolkit = ptxas_report.find_toolkit()
        if toolkit is None:
            pytest.skip("no nvcc on this machine")
        nvdisasm = ptxas_report.find_nvdisasm(toolkit)
        if nvdisasm is None:
            pytest.skip("no nvdisasm on PATH, next to nvcc or from pip's nvidia-cuda-nvdisasm")
        return toolkit, nvdisasm

    @pytest.mark.parametrize(
        ("path", "arch"),
        [
            ("csrc/cuda/sm80/gradient_products.cu", "80"),
            ("csrc/cuda/sm90/gradient_products.cu", "90a"),
        ],
    )
    def test_machine_code_has_the_instructions(self, path, arch):
        toolkit, nvdisasm = self.toolkit()
        source = next(s for s in ptxas_report.find_sources() if s.path == path)
        kernels = ptxas_report.compile_source(toolkit, source, Arch.parse(arch), nvdisasm)
        assert kernels
        assert all(kernel.missing == () for kernel in kernels)

    def test_machine_code_without_them_is_caught(self, monkeypatch):
        toolkit, nvdisasm = self.toolkit()
        monkeypatch.setitem(ptxas_report.INSTRUCTIONS, "generic", ("HGMMA",))
        path = "csrc/cuda/generic/bias_gradient.cu"
        source = next(s for s in ptxas_report.find_sources() if s.path == path)
        kernels = ptxas_report.compile_source(toolkit, source, Arch.parse("80"), nvdisasm)
        assert kernels
        assert all(kernel.missing == ("HGMMA",) for kernel in kernels)

    def test_table_shows_spills(self):
        kernel = ptxas_report.Compiled("sm80 tile", Arch.parse("80"), 256, 128, 1024, 49152, 16)
        report = ptxas_report.table("13.0", [kernel])
        assert "sm80 tile" in report
        assert "1024+49152" in report
        assert "128 2x8 SPILLS 16" in report


class TestMutate:
    @pytest.mark.parametrize(
        ("condition", "statement", "comment"),
        [
            ("  ", "__syncthreads();", "  // all have left"),
            ("  if (size(G) < 4) ", "__syncthreads();", ""),
            ("", "ptx::cp_async_wait<kStages - 2>();", ""),
            ("", "ptx::mbarrier_wait(ring.empty(ring.stage), ring.parity ^ 1);", ""),
            ("", "release_stage(ring, previous_stage);", ""),
        ],
    )
    def test_removes_statements(self, condition, statement, comment):
        source = f"first\n{condition}{statement}{comment}\nlast"
        (mutant,) = mutate.find_mutants("sm80/tile.cuh", source)
        assert (mutant.place, mutant.statement) == ("sm80/tile.cuh:2", statement)
        guarded = f"{condition}{{ if (!memeff_left_out(7)) {statement} }}"
        assert mutate.with_questions(source, {7: mutant}) == f"first\n{guarded}\nlast"

    @pytest.mark.parametrize(
        "line",
        [
            "// __syncthreads();",
            "ptx::cp_async_16(to, from);",
            "MEMEFF_DEVICE void release_stage() {",
        ],
    )
    def test_leaves_the_rest_alone(self, line):
        assert mutate.find_mutants("sm80/tile.cuh", line) == []

    def test_overlooks_nothing(self):
        with pytest.raises(SystemExit, match="not a statement of its own"):
            mutate.find_mutants("sm80/tile.cuh", "for (;;) ptx::bar_sync(1, 128);")

    def test_tables_can_be_read_back(self, tmp_path):
        rows = {
            "a.cu:12": ["SURVIVED", "a.cu:12", "__syncthreads();", "nobody", "abc"],
            "a.cu:9": ["caught", "a.cu:9", "ptx::bar_sync(1, 2);", "test_a: deadlock", "abc"],
        }
        mutate.write_table(tmp_path / "table.txt", rows)
        assert mutate.read_table(tmp_path / "table.txt") == rows
        text = (tmp_path / "table.txt").read_text()
        assert text.index("a.cu:9") < text.index("a.cu:12")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


class TestVerifyGpu:
    def test_status(self):
        outcome = verify_gpu.run(Step("a", python("print('well')"), 60, 1), 60)
        assert (outcome.status, outcome.log_tail) == ("passed", ["well"])
        for code, status in ((3, "failed"), (77, "skipped")):
            step = Step("b", python(f"raise SystemExit({code})"), 60, 1)
            assert verify_gpu.run(step, 60).status == status

    def test_time_limit_keeps_the_output(self):
        code = "import time; print('so far', flush=True); time.sleep(600)"
        outcome = verify_gpu.run(Step("d", python(code), 2, 1), 2)
        assert (outcome.status, outcome.log_tail) == ("timeout", ["so far"])

    def test_all_output_is_kept(self, tmp_path):
        file = tmp_path / "output.txt"
        many = "print(*range(500), sep='\\n')"
        for name in ("first", "second"):
            outcome = verify_gpu.run(Step(name, python(many), 60, 1), 60, file)
            assert len(outcome.log_tail) == verify_gpu.TAIL_LINES
        lines = file.read_text().splitlines()
        assert lines.count("0") == lines.count("499") == 2
        assert [line.split(":")[0] for line in lines if "====" in line] == [
            "==== first",
            "==== second",
        ]

    def test_missing_program_is_named(self):
        outcome = verify_gpu.run(Step("e", ["true"], 60, 1, ["no-such-program"]), 60)
        assert (outcome.status, outcome.log_tail) == ("skipped", ["no no-such-program"])

    def test_results_are_written_at_once(self, tmp_path, capsys):
        results = Results(tmp_path, {"gpu": "some"})
        for name in ("first", "second"):
            results.add(verify_gpu.Outcome(name, "passed", 1.0, "command", []))
            written = json.loads((tmp_path / "results.json").read_text())
            assert written["gpu"] == "some"
            assert written["steps"][-1]["step"] == name

    def test_without_a_gpu(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(verify_gpu, "query_gpu", lambda: None)
        monkeypatch.setattr(sys, "argv", ["verify_gpu.py", str(tmp_path / "results")])
        assert verify_gpu.main() == 77
        assert "no GPU" in capsys.readouterr().out

    @pytest.mark.parametrize("arch", ["75", "80", "90", "120"])
    def test_every_step_has_its_name_and_limit(self, arch):
        steps = list(verify_gpu.plan_steps(arch, None, {}))
        assert len({step.name for step in steps}) == len(steps)
        assert all(step.limit >= step.expected > 0 for step in steps)
        compared = [step for step in steps if "choices" in step.name]
        assert len(compared) == (0 if arch == "75" else 5)
        assert any("memeff@32MiB=sm" in " ".join(step.command) for step in steps) == (arch != "75")
        figures = [step.figures for step in steps if step.figures is not None]
        assert len(set(figures)) == len(figures) > 5
        for step in steps:
            assert (step.figures is not None) == ("--json" in step.command)

    @pytest.fixture
    def gpu(self, tmp_path, monkeypatch):
        """What main() asks of the machine, as if there were an H200 and everything was built."""
        fields = {"name": "some", "compute_cap": "9.0", "driver_version": "1"}
        monkeypatch.setattr(verify_gpu, "query_gpu", lambda: fields)
        monkeypatch.setattr(verify_gpu, "BUILD", tmp_path / "build")
        monkeypatch.setattr(verify_gpu, "cpp_build_command", lambda arch: "true")
        monkeypatch.setenv("PATH", os.environ["PATH"])

        def start(*options):
            folder = tmp_path / "results"
            monkeypatch.setattr(sys, "argv", ["verify_gpu.py", str(folder), *options])
            status = verify_gpu.main()
            return status, json.loads((folder / "results.json").read_text())["steps"]

        return start

    def test_only_some_steps(self, gpu, monkeypatch, capsys):
        ran = []

        def run(step, seconds, output=None):
            ran.append(step.name)
            return verify_gpu.Outcome(step.name, "passed", 1.0, "", [])

        monkeypatch.setattr(verify_gpu, "run", run)
        assert gpu("--steps", "conf,memcheck")[0] == 0
        assert ran == ["driver", "build of the extension", "conformance", "memcheck"]

    @pytest.fixture
    def clock(self, monkeypatch):
        """Steps that pass, in the time that they are expected to take or in that of `slow`."""
        now, slow = [0.0], {}

        def run(step, seconds, output=None):
            takes = slow.get(step.name, step.expected)
            now[0] += min(takes, seconds)
            status = "passed" if takes <= seconds else "timeout"
            return verify_gpu.Outcome(step.name, status, min(takes, seconds), "", [])

        monkeypatch.setattr(verify_gpu, "run", run)
        monkeypatch.setattr(verify_gpu.time, "monotonic", lambda: now[0])
        return now, slow

    @pytest.mark.parametrize("seconds", [550, 900])
    def test_what_fits(self, seconds, gpu, clock, capsys):
        """By expectation; what comes last is skipped, and says so."""
        status, steps = gpu("--seconds", str(seconds))
        (elapsed,), _ = clock
        assert status == 0 and elapsed <= seconds
        outcomes = {step["step"]: step["status"] for step in steps}
        names = list(outcomes)
        valuable = names[: names.index("ncu") + 1]
        assert {outcomes[name] for name in valuable} == {"passed"}
        skipped = {name for name, state in outcomes.items() if state == "skipped"}
        assert {"memcheck", "racecheck"} <= skipped if seconds == 550 else not skipped
        if skipped:
            expected = (
                "expected to take 60 s, 25 s are left of --seconds 550; --steps runs it later"
            )
            assert expected in capsys.readouterr().out

    def test_the_end_of_the_run_speaks_against_no_family(self, gpu, clock, capsys):
        """A step may hang, or have been given too little time by those before it."""
        _, slow = clock
        slow["memeff-tune"] = 120.0
        slow["CUDA tests, sm80"] = 89.0
        status, steps = gpu("--seconds", "250")
        outcomes = {step["step"]: step["status"] for step in steps}
        assert status == 0 and outcomes["CUDA tests, sm80"] == "unfinished"
        assert "left out" not in capsys.readouterr().out
        slow["CUDA tests, sm80"] = 91.0
        clock[0][0] = 0.0
        status, steps = gpu("--seconds", "550")
        outcomes = {step["step"]: step["status"] for step in steps}
        assert status == 1 and outcomes["CUDA tests, sm80"] == "timeout"
        assert "sm80 is left out" in capsys.readouterr().out

    def test_the_documentation_has_these_seconds(self):
        steps = list(verify_gpu.plan_steps("90", None, {}))
        names = [step.name for step in steps]
        assert names[0] == "diagnostics"  # seconds that are not worth a line
        expected = sum(step.expected for step in steps[1 : names.index("racecheck") + 1])
        section = (ROOT / "docs" / "kernels.md").read_text().split("### `make verify-gpu`")[1]
        rows = [line.split("|") for line in section.split("\n#")[0].splitlines() if "|" in line]
        assert sum(int(row[2]) for row in rows if row[2].strip().isdigit()) == expected

    def test_rehearsal(self, gpu, monkeypatch, capsys):
        """A run in which families hang, crash and are wrong: the rest is done without them."""
        tuned = {"generic": "verified", "sm80": "wrong number: dx", "sm90": "verified",
                 "sm90x2": "verified", "sm90rs": "verified"}  # fmt: skip
        figures = {
            "memeff-tune": {"results": [{"families": tuned}]},
            "kernels alone": {"shapes": []},
        }
        scripts = {
            "CUDA tests, sm90x2": "print('case 7', flush=True); import time; time.sleep(600)",
            "CUDA tests, sm90rs": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "memcheck": "raise SystemExit(9)",
        }
        real = verify_gpu.run

        def run(step, seconds, output=None):
            code = scripts.get(step.name, "")
            if step.name in figures:
                code = f"open({str(step.figures)!r}, 'w').write({json.dumps(figures[step.name])!r})"
            limit = 2.0 if "sleep" in code else seconds
            done = real(replace(step, command=python(code), needs=()), limit, output)
            return replace(done, command=" ".join(step.command))

        monkeypatch.setattr(verify_gpu, "run", run)
        status, steps = gpu("--seconds", "600")
        assert status == 1
        outcomes = {step["step"]: step["status"] for step in steps}
        bad = {name: status for name, status in outcomes.items() if status != "passed"}
        assert bad == {"CUDA tests, sm90x2": "timeout", "CUDA tests, sm90rs": "failed",
                       "memcheck": "failed"}  # fmt: skip
        assert "CUDA tests, sm90" in outcomes and "CUDA tests, sm80" not in outcomes
        names = [step["step"] for step in steps]
        (hung,) = (step for step in steps if step["status"] == "timeout")
        assert hung["log_tail"] == ["case 7"]
        by_name = {step["step"]: step for step in steps}
        assert by_name["memeff-tune"]["figures"] == figures["memeff-tune"]
        # What was wrong stays out at once, what hung or crashed from then on.
        assert "--families generic,sm90,sm90rs,sm90x2,cublas" in by_name["kernels alone"]["command"]
        for step in steps[names.index("CUDA tests, sm90rs") + 1 :]:
            for family in ("sm80", "sm90x2", "sm90rs"):
                assert family not in step["command"], step["step"]
        assert "C++ kernel tests, sm90, trapping hangs" in names
        assert sum("sm90" in step["command"] for step in steps) > 8
        printed = capsys.readouterr().out
        assert "sm80 is left out from here on: memeff-tune: wrong number: dx" in printed
        assert "sm90x2 is left out from here on: CUDA tests, sm90x2: timeout" in printed

    def test_a_driver_that_does_not_serve_is_a_failure(self, gpu, monkeypatch, capsys):
        """Nothing else runs: tests would be skipped, as if nothing was wrong."""
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        status, steps = gpu()
        assert (status, [(s["step"], s["status"]) for s in steps]) == (1, [("driver", "failed")])

    @pytest.mark.parametrize("driver", [12080, 13000, 13010])
    def test_drivers(self, driver, monkeypatch):
        """The check, with a torch that has a GPU."""
        ones = torch.ones(3)
        monkeypatch.setattr(torch, "ones", lambda *shape, device: ones)
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
        monkeypatch.setattr(sys, "argv", ["-c", "13"])
        if driver < 13000:
            with pytest.raises(
                SystemExit, match="for CUDA 12, nvcc is of CUDA 13: install a newer"
            ):
                exec(verify_gpu.DRIVER_CHECK, {})
        else:
            exec(verify_gpu.DRIVER_CHECK, {})

    def test_builds_without_a_gpu(self, gpu, monkeypatch, capsys):
        monkeypatch.setattr(verify_gpu, "query_gpu", lambda: None)
        monkeypatch.setattr(
            verify_gpu, "run",
            lambda step, seconds, output=None: verify_gpu.Outcome(step.name, "passed", 1, "", []),
        )  # fmt: skip
        status, steps = gpu("--build-only", "90")
        assert status == 0
        assert [step["step"] for step in steps] == [
            "build of the extension",
            "build of the C++ tests",
        ]

    def test_figures_become_part_of_the_outcome(self, tmp_path):
        file = tmp_path / "new" / "figures.json"
        writes = f"open({str(file)!r}, 'w').write('[1, 2]')"
        outcome = verify_gpu.run(Step("f", python(writes), 60, 1, figures=file), 60)
        assert outcome.figures == [1, 2]
        # Those of an earlier run are not taken for this one's.
        outcome = verify_gpu.run(Step("g", python("raise SystemExit(3)"), 60, 1, figures=file), 60)
        assert (outcome.status, outcome.figures) == ("failed", None)

    def test_kernels_with_and_without_a_stagger(self, tmp_path):
        steps = {step.name: step for step in verify_gpu.plan_steps("90", None, {})}
        build = steps["build without a stagger"]
        with_stagger, without = steps[verify_gpu.WITH_STAGGER], steps[verify_gpu.WITHOUT_STAGGER]
        assert "STAGGER_STEPS=0" in build.command[-1]
        folder = without.command[0].rsplit("/", 1)[0]
        assert f"-B {folder} " in build.command[-1]
        assert with_stagger.command[0] == steps["kernels alone"].command[0] != without.command[0]
        assert "build without a stagger" not in {
            s.name for s in verify_gpu.plan_steps("80", None, {})
        }

        def outcome(step, **medians):
            cases = [
                {"kernel": "linear_gradient", "family": family, "variant": "", "median_s": median}
                for family, median in medians.items()
            ]
            return verify_gpu.Outcome(
                step.name, "passed", 1, "", [], {"shapes": [{"cases": cases}]}
            )

        results = Results(tmp_path, {})
        results.add(outcome(without, sm90=0.014, sm90x2=0.013, sm80=0.03))
        assert "stagger" not in json.loads((tmp_path / "results.json").read_text())
        results.add(outcome(with_stagger, sm90=0.0138, sm80=0.03))
        kernel = {"kernel": "linear_gradient", "family": "sm90", "variant": ""}
        expected = [{**kernel, "with_s": 0.0138, "without_s": 0.014}]
        assert json.loads((tmp_path / "results.json").read_text())["stagger"] == expected

    def test_the_table_follows_the_outcomes(self):
        environment = {
            "gpu": {"name": "NVIDIA H200", "compute_cap": "9.0", "driver_version": "580.1"},
            "torch": "2.13.0+cu130",
            "date": "2026-11-26",
            "commit": "abc",
        }
        tests = verify_gpu.Outcome("CUDA tests", "failed", 1.0, "", [])
        nothing = verify_gpu.Outcome("benchmark all", "timeout", 1.0, "", [])
        assert verify_gpu.choices_file([tests, nothing], environment, "") == ""
        kernels = verify_gpu.Outcome("kernels alone", "passed", 1.0, "", [], {"shapes": []})
        figures = {"runs": [bench_run({"sm90+generic": 2.0, "sm90+sm90": 1.0})]}
        measured = verify_gpu.Outcome("choices", "passed", 1.0, "", [], figures)
        text = verify_gpu.choices_file([tests, kernels, measured], environment, "")
        assert "commit abc; make verify-gpu: CUDA tests failed" in text
        assert '{"NVIDIA H200", 90, DType::kBFloat16, 8192, 4096, 128256, false,' in text


def bench_run(times, *, errors=None, mass="", **fields):
    """A run as memeff-bench writes it; `times` by "scores+products", None: could not run."""
    variants = [{"name": "memeff", "median_s": 0.5, "errors": {"loss": 0, "dx": 0, "dw": 0}}]
    for kernels, seconds in times.items():
        variant = {"name": f"memeff{mass}={kernels}"}
        if seconds is None:
            variant["note"] = "ValueError: no such kernels"
        else:
            exact = {"loss": 1e-8, "dx": 2e-3, "dw": 2e-3}
            variant |= {"median_s": seconds, "errors": (errors or {}).get(kernels, exact)}
        variants.append(variant)
    shape = {"tokens": 8192, "features": 4096, "vocab": 128256, "dtype": "bfloat16"}
    return {**shape, "backward": True, "variants": variants, **fields}


class TestMeasuredChoices:
    def chosen(self, run):
        return [(c.kernels, c.skips) for c in choices.choices_of([run])]

    def test_the_fastest(self):
        run = bench_run({"sm90+generic": 0.036, "sm90+sm90": 0.035, "sm80+sm80": 0.09})
        (choice,) = choices.choices_of([run])
        assert choice.kernels == "sm90+sm90"
        assert (choice.tokens, choice.features, choice.vocab) == (8192, 4096, 128256)
        assert choice.seconds == {"sm90+generic": 0.036, "sm90+sm90": 0.035, "sm80+sm80": 0.09}

    def test_the_first_unless_another_is_clearly_faster(self):
        times = {"sm90+generic": 0.0351, "sm90+sm90": 0.0350}
        assert self.chosen(bench_run(times)) == [("sm90+generic", False)]
        assert self.chosen(bench_run(dict(reversed(times.items())))) == [("sm90+sm90", False)]

    @pytest.mark.parametrize("part", ["loss", "dx", "dw"])
    @pytest.mark.parametrize("error", [0.1, float("nan"), float("inf")])
    def test_wrong_kernels_do_not_win(self, part, error):
        wrong = {"loss": 1e-8, "dx": 2e-3, "dw": 2e-3, part: error}
        times = {"sm90+generic": 0.036, "sm90+sm90": 0.001, "sm80+sm80": 0.035}
        run = bench_run(times, errors={"sm90+sm90": wrong})
        assert self.chosen(run) == [("sm80+sm80", False)]

    def test_nothing_is_right(self):
        errors = {
            "sm90+generic": {"loss": 1e-8, "dx": 1.0, "dw": 2e-3},
            "sm90+sm90": {"loss": 1e-8, "dx": 2e-3, "dw": 1.0},
        }
        assert self.chosen(bench_run({"sm90+generic": 1.0, "sm90+sm90": 2.0}, errors=errors)) == []

    def test_what_could_not_run_is_left_out(self):
        assert self.chosen(bench_run({"sm90+generic": 1.0, "sm90+sm90": None})) == []
        times = {"sm90+generic": None, "sm90+sm90": 2.0, "sm80+sm80": 3.0}
        assert self.chosen(bench_run(times)) == [("sm90+sm90", False)]

    def test_forward_alone_decides_nothing(self):
        assert self.chosen(bench_run({"sm90+generic": 1.0, "sm90+sm90": 2.0}, backward=False)) == []

    def test_skipping_is_apart(self):
        run = bench_run({"sm90+sm90": 1.0, "sm80+sm80": 2.0}, mass="~1e-3")
        assert self.chosen(run) == [("sm90+sm90", True)]
        exact = bench_run({"sm90+generic": 1.0, "sm90+sm90": 2.0})
        run["variants"] += exact["variants"]
        assert self.chosen(run) == [("sm90+generic", False), ("sm90+sm90", True)]

    def table(self, gpu="NVIDIA H200", old="", times=None):
        times = times or {"sm90+generic": 0.036, "sm90+sm90": 0.035}
        chosen = choices.choices_of([bench_run(times)])
        return measured_choices.render(chosen, gpu, 90, ["driver 580"], old)

    def test_rows(self):
        text = self.table()
        assert "// NVIDIA H200\n// driver 580\n" in text
        assert "// sm90+sm90 35.00, sm90+generic 36.00\n" in text
        assert (
            '\n{"NVIDIA H200", 90, DType::kBFloat16, 8192, 4096, 128256, false, "sm90,sm90"},\n'
        ) in text

    def test_other_gpus_stay(self):
        current = verify_gpu.CHOICES.read_text()
        both = self.table("NVIDIA H100 80GB HBM3", self.table(old=current))
        assert both.count("{") == 2
        again = self.table(old=both, times={"sm80+generic": 1.0, "sm80+sm80": 2.0})
        assert again.count('{"NVIDIA H200"') == again.count('{"NVIDIA H100 80GB HBM3"') == 1
        assert '"sm80,generic"' in again
        assert again.count("The table of measured choices") == 1
        assert "No rows" not in again

    def test_the_committed_file_starts_alike(self):
        assert verify_gpu.CHOICES.read_text().startswith(measured_choices.HEAD)

    @pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
    @pytest.mark.parametrize("capability", [80, 90])
    def test_compiles(self, tmp_path, capability):
        """As part of selection, with every family that may win."""
        runs = []
        for skips in (False, True):
            families = choices.candidates(capability, skips)
            for best in families:
                times = {name: 1.0 if name == best else 2.0 for name in families}
                runs.append(bench_run(times, mass="~1e-3" if skips else ""))
        chosen = choices.choices_of(runs)
        assert len(chosen) == len(runs)
        text = measured_choices.render(chosen, "NVIDIA", capability, [])
        (tmp_path / "cuda").mkdir()
        (tmp_path / "cuda" / "measured_choices.inc").write_text(text)
        flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
        folders = [f"-I{tmp_path}", f"-I{ROOT / 'csrc'}"]
        subprocess.run(["c++", *flags, *folders, ROOT / "csrc/cuda/select.cpp"], check=True)

    def test_candidates(self):
        assert choices.candidates(75) == ()
        assert choices.candidates(120) == choices.candidates(80)
        for capability, skips in itertools.product((80, 90), (False, True)):
            assert choices.candidates(capability, skips)[0] == "generic+generic"  # the default
