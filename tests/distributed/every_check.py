"""The checks of all files here, by name: (number of processes, function)."""

import head_checks  # noqa: F401  (adds its own)
import label_checks  # noqa: F401
import statistics_checks  # noqa: F401
from checks import CHECKS

__all__ = ["CHECKS"]
