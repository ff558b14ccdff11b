"""What one build compiles: the table of sources, narrowed by switches and by the CUDA toolkit."""

from dataclasses import dataclass

from buildtools.config import BuildConfig
from buildtools.cuda_archs import Arch, choose_archs, describe_archs
from buildtools.cuda_toolkit import Toolkit
from buildtools.ninja_objects import Compilation
from buildtools.sources import Source, find_sources


@dataclass(frozen=True)
class BuildPlan:
    """sources: all of the build. compilations: those of them that torch does not compile. archs:
    the GPU architectures that kernels are compiled for, as "80 90+PTX 90a".
    """

    sources: tuple[Source, ...]
    compilations: tuple[Compilation, ...]
    archs: str

    @classmethod
    def make(cls, config: BuildConfig, toolkit: Toolkit | None) -> "BuildPlan":
        """The plan of a build with the CUDA kernels, or, without a toolkit, without them.

        Raises:
            SystemExit: nvcc knows none of a source's architectures.
        """
        sources = [s for s in find_sources() if toolkit is not None or not s.needs_cuda]
        compilations = []
        built: list[Arch] = []
        for source in sources:
            if source.toolchain == "cxx":
                compilations.append(Compilation(source, "cxx", source.flags))
            elif source.toolchain == "cuda" and toolkit is not None:
                archs = _source_archs(source, config, toolkit)
                gencodes = [f"-gencode={arch.gencode}" for arch in archs]
                compilations.append(Compilation(source, "nvcc", [*gencodes, *source.flags]))
                built += [arch for arch in archs if arch.sass]
        return cls(tuple(sources), tuple(compilations), describe_archs(built))


def _source_archs(source: Source, config: BuildConfig, toolkit: Toolkit) -> list[Arch]:
    archs = choose_archs(source.archs, config.cuda_archs)
    known = [arch for arch in archs if toolkit.supports(arch)]
    unknown = ", ".join(str(arch) for arch in archs if arch not in known)
    if not known:
        raise SystemExit(
            f"memeff: {source.path} is compiled for {unknown}, which CUDA {toolkit.version} "
            "does not know. Install a newer toolkit, or name another GPU in MEMEFF_CUDA_ARCHS."
        )
    if unknown:
        print(f"memeff: CUDA {toolkit.version} does not know {unknown}: left out of {source.path}")
    return known
