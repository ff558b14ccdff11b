"""Loads memeff._C, the extension that registers the operators, or explains why it cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import re
from pathlib import Path
from types import ModuleType

import torch  # first: the extension links against libraries that only torch loads

from memeff import _tuned

# module.cpp stores this text, so that the version can be read from a file that does not load.
_TORCH_STAMP = re.compile(rb"memeff was built with torch=([^\s\0]+)")


@functools.cache
def load() -> ModuleType:
    """The extension module.

    Raises:
        ImportError: it is not built, or not for this torch; the message names the remedy.
    """
    try:
        extension = importlib.import_module("memeff._C")
    except ImportError as error:
        raise ImportError(explain_failure(error)) from error
    built_with = str(extension.build_info()["torch"])
    if not same_minor_version(built_with, torch.__version__):
        raise ImportError(_wrong_torch(built_with))
    extension.add_tuned(*_tuned.known(_tuned.tune_file(), extension.build_info(), extension_file()))
    return extension


def is_available() -> bool:
    """Whether load() succeeds."""
    try:
        load()
    except ImportError:
        return False
    return True


def extension_file() -> Path | None:
    """The shared library of this Python version next to this file, whether or not it loads."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        file = Path(__file__).with_name(f"_C{suffix}")
        if file.exists():
            return file
    return None


def built_torch_version() -> str | None:
    """The torch version that the extension was compiled against, found without loading it."""
    file = extension_file()
    stamp = _TORCH_STAMP.search(file.read_bytes()) if file else None
    return stamp[1].decode() if stamp else None


def same_minor_version(built_with: str, running: str) -> bool:
    """Whether two torch versions share major and minor number: across these the C++ ABI changes."""
    return built_with.split(".")[:2] == running.split(".")[:2]


def install_command() -> str:
    """What builds the extension against the torch that is installed now."""
    source = Path(__file__).resolve().parent.parent
    if (source / "setup.py").exists():
        return f"pip install -e {source}"
    return "pip install --force-reinstall --no-deps PATH_TO_MEMEFF_SOURCES"


def explain_failure(error: ImportError) -> str:
    """Why memeff._C did not load, and the command that mends it."""
    if extension_file() is None:
        others = sorted(file.name for file in Path(__file__).parent.glob("_C.*.so"))
        found = f" (found {', '.join(others)}, built for another Python)" if others else ""
        return f"memeff's C++ extension is not built{found}. Type:  {install_command()}"
    built_with = built_torch_version()
    if built_with is not None and not same_minor_version(built_with, torch.__version__):
        return _wrong_torch(built_with)
    return f"memeff's C++ extension does not load: {error}. Build it again:  {install_command()}"


def _wrong_torch(built_with: str) -> str:
    return (
        f"memeff's C++ extension was built for torch {built_with}, but torch {torch.__version__} "
        f"is installed. Build it again:  {install_command()}"
    )
