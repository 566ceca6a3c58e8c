"""Files of human comparisons, read for training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feedback.jsonl import Skipped, read_records
from feedback.rankings import ComparisonGroup, group_comparisons
from feedback.records import Preference, Ranking, parse_preference, parse_ranking


def read_comparisons(files: Sequence[str], skip_invalid: bool, skipped: Skipped) -> list[ComparisonGroup]:
    """Preferences and rankings of files, gathered by prompt. Raises `DataError`."""

    def parse(record: Any) -> Preference | Ranking:
        return parse_ranking(record) if "ranks" in record else parse_preference(record)

    groups: list[ComparisonGroup] = []
    for file in files:
        path = Path(file).expanduser()
        records = read_records([path], parse, skipped if skip_invalid else None)
        groups.extend(group_comparisons(records, default_source=path.name.split(".")[0]))
    return groups
