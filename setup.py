"""Metadata is in pyproject.toml; here only the C++ extension is declared."""

import sys
from pathlib import Path

# A PEP 517 front end need not put the project's directory on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from setuptools import setup

from buildtools.extension import build_ext_command, memeff_extension

setup(ext_modules=[memeff_extension()], cmdclass={"build_ext": build_ext_command()})
