"""What `winnow reward eval` reads: comparisons, rankings, benchmarks, labels and candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feedback.jsonl import DataError, Skipped, read_records
from feedback.rankings import ComparisonGroup
from feedback.records import Completions, Messages, Ranking, RecordError, parse_completions, parse_ranking
from winnow.console import CommandError

if TYPE_CHECKING:
    from training.acceptability import Labelled
    from training.rewardbench import BenchmarkItem


@dataclass(frozen=True, slots=True)
class Candidates:
    """Completions of a prompt, with the rewards of a better judge where the record has them."""

    prompt: Messages
    completions: Sequence[Messages]
    gold: Sequence[float] | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that was given; what was not is empty."""

    groups: Sequence[ComparisonGroup]
    rankings: Sequence[Ranking]
    training: Sequence[ComparisonGroup]
    benchmarks: Mapping[str, Sequence[BenchmarkItem]]
    labelled: Sequence[Labelled]
    candidates: Sequence[Candidates]


class Reading:
    """Reads files of every kind, counting bad records where that is wanted. Raises `CommandError`."""

    def __init__(self, skip_invalid: bool) -> None:
        """`skip_invalid`: count bad records in `skipped` instead of stopping at the first."""
        self._skip_invalid = skip_invalid
        self.skipped = Skipped()

    def inputs(
        self,
        data: Sequence[Path],
        baselines: Sequence[Path],
        benchmarks: Sequence[Path],
        labelled: Sequence[Path],
        candidates: Sequence[Path],
        wants_gold: bool,
    ) -> Inputs:
        """`wants_gold`: candidates must come with the better judge's rewards."""
        from training.acceptability import parse_labelled
        from training.rewardbench import parse_item

        counted = self.skipped if self._skip_invalid else None
        # Rankings are read a second time, whole: groups hold pairs only. Bad records have been counted by then.
        again = Skipped() if self._skip_invalid else None

        def parse_candidates(record: Mapping[str, Any]) -> Candidates:
            return _parse_candidates(record, wants_gold)

        try:
            groups = self._comparisons(data)
            return Inputs(
                groups,
                [one for path in data for one in read_records([path], _ranking_in(path), again) if one is not None],
                self._comparisons(baselines),
                {str(path): list(read_records([path], parse_item, counted)) for path in benchmarks},
                list(read_records(labelled, parse_labelled, counted)),
                list(read_records(candidates, parse_candidates, counted)),
            )
        except DataError as error:
            raise CommandError(str(error)) from error

    def _comparisons(self, files: Sequence[Path]) -> list[ComparisonGroup]:
        from training.comparisons import read_comparisons

        groups = read_comparisons([str(file) for file in files], self._skip_invalid, self.skipped)
        if files and not groups:
            raise CommandError(f"{', '.join(map(str, files))}: no decided comparison in there")
        return groups


def _ranking_in(path: Path) -> Callable[[Mapping[str, Any]], Ranking | None]:
    def parse(record: Mapping[str, Any]) -> Ranking | None:
        if "ranks" not in record:
            return None
        ranking = parse_ranking(record)
        return replace(ranking, source=ranking.source or path.name.split(".")[0])

    return parse


def _parse_candidates(record: Mapping[str, Any], wants_gold: bool) -> Candidates:
    found: Completions = parse_completions(record)
    if not wants_gold:
        return Candidates(found.prompt, found.completions, None)
    rewards = record.get("rewards")
    if not isinstance(rewards, list) or not all(map(_is_number, rewards)):
        raise RecordError("rewards", "must be a list of the better judge's numbers, or name one with --gold")
    if len(rewards) != len(found.completions):
        raise RecordError("rewards", f"has {len(rewards)} entries for {len(found.completions)} completions")
    return Candidates(found.prompt, found.completions, [float(r) for r in rewards])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
