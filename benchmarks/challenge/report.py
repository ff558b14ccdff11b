"""What every section returns: one row per criterion."""

from __future__ import annotations

from typing import Any

MIB = 2**20
Row = dict[str, Any]


def row(criterion: str, passed: bool | None, figures: str, **numbers: Any) -> Row:
    """`passed` is None for what could not be measured here."""
    return {"criterion": criterion, "passed": passed, "figures": figures, **numbers}
