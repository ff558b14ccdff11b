"""The extension module memeff._C for setuptools."""

import os
import shlex
import sys
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

from buildtools.build_plan import BuildPlan
from buildtools.config import BuildConfig
from buildtools.cuda_toolkit import Toolkit, choose_toolkit, find_toolkit
from buildtools.environment import missing_torch_message
from buildtools.ninja_objects import compile_objects
from buildtools.sources import ROOT, find_sources


def memeff_extension() -> Extension:
    """memeff._C with the sources that torch compiles; build_ext_command() adds everything else."""
    sources = [s.path for s in find_sources() if s.toolchain == "torch" and not s.needs_cuda]
    return Extension("memeff._C", sources, language="c++")


def build_ext_command() -> type[build_ext]:
    """The build_ext command: torch's, completed; without torch one that says what is missing.

    Metadata and source distributions need no torch, only the compilation does.
    """
    try:
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return _BuildWithoutTorch
    import torch

    class BuildMemeff(cpp_extension.BuildExtension):
        """Compiles the torch-free sources with flags of their own, then lets torch do the rest."""

        def finalize_options(self) -> None:
            super().finalize_options()
            # A fixed place: an editable installation builds in a temporary folder by default and
            # would compile everything again each time.
            mode = "debug" if BuildConfig.from_environment().debug else "release"
            self.build_temp = str(ROOT / "build" / f"{sys.implementation.cache_tag}-{mode}")

        def build_extensions(self) -> None:
            config = BuildConfig.from_environment()
            os.environ["MAX_JOBS"] = str(config.jobs)  # torch reads the same variable
            toolkit = choose_toolkit(
                config.cuda, torch.__version__, torch.version.cuda, find_toolkit()
            )
            plan = BuildPlan.make(config, toolkit)
            for extension in self.extensions:
                extension.sources = [s.path for s in plan.sources if s.toolchain == "torch"]
                extension.libraries = ["c10", "torch", "torch_cpu"]
                extension.library_dirs = cpp_extension.library_paths()
                extension.extra_compile_args = self._torch_flags(config)
                extension.extra_objects = self._torch_free_objects(plan, config, toolkit)
                if toolkit is not None:
                    # The static runtime: torch's own may be absent, and need not be the same.
                    extension.libraries += ["cudart_static", "dl", "pthread", "rt"]
                    extension.library_dirs.append(str(toolkit.library_folder))
                    extension.extra_compile_args += [
                        f'-DMEMEFF_WITH_CUDA="{toolkit.version}"',
                        f'-DMEMEFF_CUDA_ARCHS="{plan.archs}"',
                    ]
            super().build_extensions()

        def _torch_flags(self, config: BuildConfig) -> list[str]:
            flags = [*config.cxx_flags, f"-I{ROOT / 'csrc'}"]
            # As system headers, so that our warnings are not torch's.
            for folder in cpp_extension.include_paths():
                flags += ["-isystem", folder]
            if sys.platform == "linux":
                # at::parallel_for is sequential without it. Not given to the linker: the runtime
                # must be the one torch has loaded, so that torch.set_num_threads governs both.
                flags.append("-fopenmp")
            # ninja does not look at system headers: the version makes it rebuild for another torch.
            flags.append(f'-DMEMEFF_TORCH_VERSION="{torch.__version__}"')
            flags.append(f'-DMEMEFF_CXX_FLAGS="{" ".join(config.cxx_flags)}"')
            return flags

        def _torch_free_objects(
            self, plan: BuildPlan, config: BuildConfig, toolkit: Toolkit | None
        ) -> list[str]:
            include = f"-I{ROOT / 'csrc'}"
            cxx = shlex.split(cpp_extension.get_cxx_compiler())
            compilers = {"cxx": [*cxx, "-std=c++17", "-fPIC", *config.cxx_flags, include]}
            if toolkit is not None:
                compilers["nvcc"] = [*config.nvcc_command(toolkit.nvcc), include]
            objects = compile_objects(
                plan.compilations,
                compilers=compilers,
                root=ROOT,
                build_folder=Path(self.build_temp) / "torch-free",
                jobs=config.jobs,
            )
            return [str(path) for path in objects]

    return BuildMemeff


class _BuildWithoutTorch(build_ext):  # type: ignore[misc]
    def run(self) -> None:
        raise SystemExit(missing_torch_message())
