"""The checks of all files here, by name: (number of processes, function)."""

from checks import CHECKS

__all__ = ["CHECKS"]
