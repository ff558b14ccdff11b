"""The CUDA side of the build: which toolkit, which architectures, what nvcc is made to report."""

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from buildtools.build_plan import BuildPlan
from buildtools.config import BuildConfig
from buildtools.cuda_archs import Arch, choose_archs, describe_archs, parse_archs
from buildtools.cuda_toolkit import Toolkit, choose_toolkit, find_toolkit
from buildtools.ninja_objects import Compilation, compile_objects
from buildtools.sources import ROOT, Source, find_sources

TOOLKIT_13 = Toolkit(Path("/opt/cuda-13.0"), "13.0", frozenset({"75", "80", "90", "100", "120"}))
needs_nvcc = pytest.mark.skipif(find_toolkit() is None, reason="no nvcc on this machine")


def names(archs: list[Arch]) -> list[str]:
    return [str(arch) for arch in archs]


class TestArchs:
    @pytest.mark.parametrize(
        ("text", "gencode", "cmake"),
        [
            ("75", "arch=compute_75,code=[sm_75]", "75-real"),
            ("90a", "arch=compute_90a,code=[sm_90a]", "90a-real"),
            ("100f", "arch=compute_100f,code=[sm_100f]", "100f-real"),
            ("90+PTX", "arch=compute_90,code=[sm_90,compute_90]", "90"),
        ],
    )
    def test_spelling(self, text, gencode, cmake):
        arch = Arch.parse(text)
        assert (str(arch), arch.gencode, arch.cmake) == (text, gencode, cmake)

    @pytest.mark.parametrize("text", ["9.0", "sm_90", "90b", "native", "90+SASS", "9"])
    def test_anything_else_is_an_error(self, text):
        with pytest.raises(ValueError, match="expected 80, 90a, 100f"):
            Arch.parse(text)

    @pytest.mark.parametrize(
        ("row", "requested", "chosen"),
        [
            ("75;80;90+PTX", "", ["75", "80", "90+PTX"]),
            ("75;80;90+PTX", "90a", ["90"]),  # the row says what 90 means to this source
            ("90a", "90", ["90a"]),
            ("75;80;100f", "100", ["100f"]),
            ("75;80;100f", "103;75", ["103", "75"]),  # not in the row, but newer than its first
            ("75;80;90+PTX", "80+PTX", ["80+PTX"]),
        ],
    )
    def test_requested(self, row, requested, chosen):
        assert names(choose_archs(parse_archs(row), parse_archs(requested))) == chosen

    @pytest.mark.parametrize(("row", "requested"), [("80;90", "75"), ("90a", "80"), ("90a", "120")])
    def test_sources_for_other_gpus_are_ptx_only(self, row, requested):
        (arch,) = choose_archs(parse_archs(row), parse_archs(requested))
        assert (arch.sass, arch.ptx) == (False, True)
        assert "sm_" not in arch.gencode

    def test_description_has_each_once(self):
        archs = parse_archs("120;75;90") + parse_archs("90a") + parse_archs("75;90+PTX")
        assert describe_archs(archs) == "75 90+PTX 90a 120"


def install_toolkit(root: Path, version: str = "13.0", archs: str = "75 80 90") -> None:
    """A folder that looks like a toolkit, with an nvcc that answers like one."""
    (root / "bin").mkdir(parents=True)
    script = (
        "#!/bin/sh\n"
        'case "$1" in\n'
        f"  --dryrun) echo '#$ _HERE_={root}/bin' >&2; echo '#$ TOP={root}/bin/..' >&2;;\n"
        f"  --version) echo 'Cuda compilation tools, release {version}, V{version}.88';;\n"
        f"  --list-gpu-arch) for arch in {archs}; do echo compute_$arch; done;;\n"
        "esac\n"
    )
    write_program(root / "bin" / "nvcc", script)


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class TestToolkit:
    def test_found_through_a_wrapper_elsewhere(self, tmp_path):
        install_toolkit(tmp_path / "cuda-13.0")
        (tmp_path / "tools").mkdir()
        write_program(
            tmp_path / "tools" / "nvcc", f'#!/bin/sh\nexec {tmp_path}/cuda-13.0/bin/nvcc "$@"\n'
        )
        toolkit = find_toolkit({"PATH": str(tmp_path / "tools")})
        assert toolkit == Toolkit(tmp_path / "cuda-13.0", "13.0", frozenset({"75", "80", "90"}))

    def test_cuda_home_comes_first(self, tmp_path):
        install_toolkit(tmp_path / "home", "12.8")
        install_toolkit(tmp_path / "path", "13.0")
        environment = {"CUDA_HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "path" / "bin")}
        toolkit = find_toolkit(environment)
        assert toolkit is not None
        assert toolkit.version == "12.8"

    def test_something_else_called_nvcc_is_named(self, tmp_path):
        write_program(tmp_path / "nvcc", "#!/bin/sh\necho hello\n")
        with pytest.raises(SystemExit, match=f"{tmp_path}/nvcc does not answer"):
            find_toolkit({"PATH": str(tmp_path)})

    def test_incomplete_toolkit_is_named(self, tmp_path):
        install_toolkit(tmp_path / "cuda")
        toolkit = find_toolkit({"CUDA_HOME": str(tmp_path / "cuda")})
        assert toolkit is not None
        with pytest.raises(SystemExit, match="libcudart_static"):
            _ = toolkit.library_folder

    def test_family_code_needs_a_new_toolkit(self):
        assert TOOLKIT_13.supports(Arch.parse("100f"))
        old = Toolkit(TOOLKIT_13.root, "12.8", TOOLKIT_13.archs)
        assert not old.supports(Arch.parse("100f"))
        assert old.supports(Arch.parse("100"))
        assert not old.supports(Arch.parse("86"))

    @needs_nvcc
    def test_of_this_machine(self):
        toolkit = find_toolkit()
        assert toolkit is not None
        assert toolkit.nvcc.exists()
        assert (toolkit.library_folder / "libcudart_static.a").exists()
        assert toolkit.supports(Arch.parse("90a"))


class TestDecision:
    def test_auto_is_for_a_torch_with_cuda(self):
        assert choose_toolkit(None, "2.13.0+cpu", None, TOOLKIT_13) is None
        assert choose_toolkit(None, "2.13.0+cu130", "13.0", TOOLKIT_13) is TOOLKIT_13

    def test_forced_on_a_torch_without_cuda(self):
        assert choose_toolkit(True, "2.13.0+cpu", None, TOOLKIT_13) is TOOLKIT_13

    def test_forced_off(self):
        assert choose_toolkit(False, "2.13.0+cu130", "13.0", TOOLKIT_13) is None

    def test_auto_without_nvcc_says_what_is_left_out(self, capsys):
        assert choose_toolkit(None, "2.13.0+cu130", "13.0", None) is None
        printed = capsys.readouterr().out
        assert "without CUDA kernels" in printed
        assert "CUDA 13 toolkit" in printed

    def test_forced_without_nvcc(self):
        with pytest.raises(SystemExit, match=r"MEMEFF_CUDA=1.*no nvcc.*CUDA_HOME"):
            choose_toolkit(True, "2.13.0+cpu", None, None)

    @pytest.mark.parametrize("wanted", [None, True])
    def test_other_major_version(self, wanted):
        with pytest.raises(SystemExit, match=r"is CUDA 13\.0.*torch 2\.13\.0.*CUDA 12\.8.*CUDA 12"):
            choose_toolkit(wanted, "2.13.0+cu128", "12.8", TOOLKIT_13)

    def test_other_minor_version_is_fine(self):
        assert choose_toolkit(None, "2.13.0+cu131", "13.1", TOOLKIT_13) is TOOLKIT_13


class TestPlan:
    def test_no_toolkit_no_cuda(self):
        plan = BuildPlan.make(BuildConfig.from_environment({}), None)
        assert plan.sources
        assert not any(source.needs_cuda for source in plan.sources)
        assert {item.compiler for item in plan.compilations} == {"cxx"}

    def test_every_kernel_by_nvcc(self):
        kernels = {source.path for source in find_sources() if source.path.endswith(".cu")}
        assert kernels
        plan = BuildPlan.make(BuildConfig.from_environment({}), TOOLKIT_13)
        assert kernels == {i.source.path for i in plan.compilations if i.compiler == "nvcc"}

    def test_unknown_architectures_are_left_out_aloud(self, capsys):
        old = Toolkit(Path("/opt/cuda-12.4"), "12.4", frozenset({"75", "80", "86", "89", "90"}))
        plan = BuildPlan.make(BuildConfig.from_environment({}), old)
        assert "120" not in plan.archs
        assert "90+PTX" in plan.archs
        assert "CUDA 12.4 does not know 100f, 120" in capsys.readouterr().out

    def test_nothing_left_is_an_error(self):
        config = BuildConfig.from_environment({"MEMEFF_CUDA_ARCHS": "110"})
        with pytest.raises(SystemExit, match=r"110.*CUDA 13\.0.*MEMEFF_CUDA_ARCHS"):
            BuildPlan.make(config, TOOLKIT_13)

    def test_parts_of_a_cuda_build_only(self, tmp_path):
        in_cuda = ("plan.cpp", "backend.cpp", "gemm_torch.cpp", "generic/rows.cu")
        in_bindings = ("cuda_ops.cpp", "all_ops.cpp", "ops.cpp")
        for path in [f"cuda/{p}" for p in in_cuda] + [f"bindings/{p}" for p in in_bindings]:
            file = tmp_path / "csrc" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        sources = {Path(s.path).name: s for s in find_sources(tmp_path)}
        assert {name for name, s in sources.items() if s.needs_cuda} == {
            "backend.cpp", "gemm_torch.cpp", "rows.cu", "cuda_ops.cpp"
        }  # fmt: skip
        assert {name for name, s in sources.items() if s.toolchain == "torch"} == {
            "gemm_torch.cpp", "cuda_ops.cpp", "all_ops.cpp"
        }  # fmt: skip


class TestComplaintsOfPtxas:
    SERIALIZED = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async serialized"

    def compile(self, tmp_path: Path, mode: str, text: str, status: int = 0) -> int:
        compiler = tmp_path / "compiler"
        write_program(compiler, f"#!/bin/sh\necho '{text}' >&2\ntouch \"$2\"\nexit {status}\n")
        supervisor = ROOT / "buildtools" / "run_nvcc.sh"
        command = ["sh", supervisor, mode, compiler, "-o", tmp_path / "kernel.o"]
        return subprocess.run(command, check=False).returncode

    def test_are_errors(self, tmp_path, capfd):
        assert self.compile(tmp_path, "error", self.SERIALIZED) != 0
        assert not (tmp_path / "kernel.o").exists()
        assert "C7510" in capfd.readouterr().out

    def test_or_loud(self, tmp_path, capfd):
        assert self.compile(tmp_path, "warn", self.SERIALIZED) == 0
        assert (tmp_path / "kernel.o").exists()
        assert "complaint" in capfd.readouterr().out

    def test_silence_passes(self, tmp_path):
        assert self.compile(tmp_path, "error", "kernel.cu") == 0
        assert (tmp_path / "kernel.o").exists()

    def test_status_is_passed_on(self, tmp_path):
        assert self.compile(tmp_path, "warn", "error: no", status=2) == 2


SPILLING = """
__global__ void __launch_bounds__(1024) spills(float* p, int n) {
  float a[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) a[i] = p[i * n];
  for (int j = 0; j < n; ++j)
#pragma unroll
    for (int i = 0; i < 96; ++i) a[i] = a[i] * a[(i + 7) % 96] + p[j];
#pragma unroll
  for (int i = 0; i < 96; ++i) p[i * n] = a[i];
}
"""


# An accumulator is changed while the product that it belongs to is on its way, so that ptxas has to
# wait after each: "(C7511) ... wgmma.mma_async instructions are serialized".
SERIALIZED = """
using Descriptor = unsigned long long;
__global__ void __launch_bounds__(128) serialized(float* out, Descriptor a, Descriptor b) {
  float d[4] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    d[0] += 1.f;
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; ++i) out[i * 128 + threadIdx.x] = d[i];
}
"""


@needs_nvcc
@pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja")
class TestNvcc:
    def build(self, root: Path, werror: bool, arch: str = "80") -> Path:
        toolkit = find_toolkit()
        assert toolkit is not None
        config = BuildConfig.from_environment({"MEMEFF_WERROR": "1" if werror else "0"})
        source = Source("kernel.cu", "cuda")
        (path,) = compile_objects(
            [Compilation(source, "nvcc", [f"-gencode={Arch.parse(arch).gencode}"])],
            compilers={"nvcc": config.nvcc_command(toolkit.nvcc)},
            root=root,
            build_folder=root / "build",
            jobs=1,
        )
        return path

    def test_an_included_header_rebuilds(self, tmp_path):
        (tmp_path / "kernel.cu").write_text(
            '#include "size.cuh"\n__global__ void k(int* p) { *p = size; }\n'
        )
        (tmp_path / "size.cuh").write_text("constexpr int size = 1;\n")
        built = self.build(tmp_path, werror=True).stat().st_mtime_ns
        assert self.build(tmp_path, werror=True).stat().st_mtime_ns == built
        (tmp_path / "size.cuh").write_text("constexpr int size = 2;\n")
        assert self.build(tmp_path, werror=True).stat().st_mtime_ns > built

    def test_spills(self, tmp_path, capfd):
        (tmp_path / "kernel.cu").write_text(SPILLING)
        assert self.build(tmp_path, werror=False).exists()
        assert "Registers are spilled" in capfd.readouterr().out
        for _ in range(2):  # and the object of the first build is not taken for the strict one's
            with pytest.raises(SystemExit):
                self.build(tmp_path, werror=True)
            assert "Registers are spilled" in capfd.readouterr().out

    def test_wgmma_one_after_the_other(self, tmp_path, capfd):
        """What nvcc's own -Werror lets pass, and the build does not."""
        (tmp_path / "kernel.cu").write_text(SERIALIZED)
        assert self.build(tmp_path, werror=False, arch="90a").exists()
        assert "wgmma.mma_async instructions are serialized" in capfd.readouterr().out
        with pytest.raises(SystemExit):
            self.build(tmp_path, werror=True, arch="90a")
        assert "wgmma.mma_async instructions are serialized" in capfd.readouterr().out
