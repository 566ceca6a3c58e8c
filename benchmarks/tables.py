"""Results as tables: printed for people, as plain values for `--output`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """One comparison. Cells are texts, numbers, or None where nothing can be said."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
