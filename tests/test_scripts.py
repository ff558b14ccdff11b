"""The scripts' own logic, without nvcc and without a GPU."""

import json
import sys

import pytest

from buildtools.cuda_archs import Arch
from buildtools.sources import ROOT

sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "emulator")]

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
            ("", "leave_stage(ring, previous_stage);", ""),
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
            "MEMEFF_DEVICE void leave_stage() {",
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
        outcome = verify_gpu.run(Step("a", python("print('well')"), 60), 60)
        assert (outcome.status, outcome.log_tail) == ("passed", ["well"])
        assert verify_gpu.run(Step("b", python("raise SystemExit(3)"), 60), 60).status == "failed"
        assert verify_gpu.run(Step("c", python("raise SystemExit(77)"), 60), 60).status == "skipped"

    def test_time_limit_keeps_the_output(self):
        code = "import time; print('so far', flush=True); time.sleep(600)"
        outcome = verify_gpu.run(Step("d", python(code), 2), 2)
        assert (outcome.status, outcome.log_tail) == ("timeout", ["so far"])

    def test_missing_program_is_named(self):
        outcome = verify_gpu.run(Step("e", ["true"], 60, ["no-such-program"]), 60)
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
    def test_every_step_has_its_name_and_limit(self, tmp_path, arch):
        steps = verify_gpu.plan_steps(tmp_path, arch)
        assert len({step.name for step in steps}) == len(steps)
        assert all(step.limit > 0 for step in steps)
        # What comes back from some machines is limited in number; logs are inside results.json.
        assert sum("--json" in step.command for step in steps) < 7
