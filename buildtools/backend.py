"""PEP 517 and PEP 660 build backend: setuptools, with the environment's torch on the path.

Listing torch as a build requirement would make pip download a second one into its isolated build
environment and compile against that. See environment.py for how the installed one is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from buildtools.environment import require_torch

# setuptools is imported inside the hooks: where it is absent too, torch is what to ask for first.
Settings = Mapping[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """The first hook that pip calls, so the first place to say that torch is missing."""
    require_torch()
    return []


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    require_torch()
    return []


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    # A source distribution compiles nothing.
    return []


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    return str(_setuptools().prepare_metadata_for_build_wheel(metadata_directory, config_settings))


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    return str(
        _setuptools().prepare_metadata_for_build_editable(metadata_directory, config_settings)
    )


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    return str(_setuptools().build_sdist(sdist_directory, config_settings))


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    require_torch()
    return str(_setuptools().build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    require_torch()
    return str(_setuptools().build_editable(wheel_directory, config_settings, metadata_directory))


def _setuptools() -> Any:
    from setuptools import build_meta

    return build_meta
