"""The checks of all files here, by name: (number of processes, function)."""

import label_checks  # noqa: F401  (adds its own)
from checks import CHECKS

__all__ = ["CHECKS"]
