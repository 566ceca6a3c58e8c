"""Rankings and preferences as one thing: completions of a prompt with who beats whom.

Comparisons of one prompt belong together: InstructGPT (arXiv 2203.02155, section 3.5) trains on all C(K,2)
pairs of a prompt as one batch element, since taken apart they overfit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from feedback.records import Messages, Preference, Ranking


@dataclass(frozen=True, slots=True)
class Pair:
    """Completion `better` beats completion `worse`: positions in the group's completions."""

    better: int
    worse: int
    weight: float = 1.0
    margin: float = 0.0
    tags: tuple[str, ...] = ()
    """Of the record that the pair comes from."""


@dataclass(frozen=True, slots=True)
class ComparisonGroup:
    """One prompt, its different completions, and the comparisons that people made between them."""

    prompt: Messages
    completions: Sequence[Messages]
    pairs: Sequence[Pair]
    source: str

    @property
    def num_completions(self) -> int:
        return len(self.completions)


def ranking_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """(better, worse) positions of all untied pairs; rank 1 is best."""
    return [
        (i, j) if ranks[i] < ranks[j] else (j, i)
        for i in range(len(ranks))
        for j in range(i + 1, len(ranks))
        if ranks[i] != ranks[j]
    ]


def ranks_of(rewards: Sequence[float]) -> list[int]:
    """The ranks that these rewards give: the highest is 1, equal ones share theirs, none is left out between."""
    places = {reward: rank for rank, reward in enumerate(sorted(set(rewards), reverse=True), start=1)}
    return [places[reward] for reward in rewards]


def group_comparisons(records: Iterable[Preference | Ranking], default_source: str = "data") -> list[ComparisonGroup]:
    """Preferences and rankings gathered by source and prompt, in order of first appearance.

    Equal completions become one; a pair that is given twice counts twice. Groups without a decided pair (all
    tied) are left out.
    """
    building: dict[str, _Building] = {}
    for record in records:
        source = record.source or default_source
        key = _fingerprint([source, list(record.prompt)])
        group = building.setdefault(key, _Building(record.prompt, source))
        if isinstance(record, Preference):
            better, worse = group.position(record.chosen), group.position(record.rejected)
            group.pairs.append(Pair(better, worse, record.weight, record.margin or 0.0, record.tags))
        else:
            places = [group.position(completion) for completion in record.completions]
            for better, worse in ranking_pairs(record.ranks):
                # A completion ranked twice with different ranks contradicts itself: nothing to learn.
                if places[better] != places[worse]:
                    group.pairs.append(Pair(places[better], places[worse], record.weight, tags=record.tags))
    return [
        ComparisonGroup(group.prompt, group.completions, group.pairs, group.source)
        for group in building.values()
        if group.pairs
    ]


class _Building:
    """A group while records are being added."""

    def __init__(self, prompt: Messages, source: str) -> None:
        self.prompt = prompt
        self.source = source
        self.completions: list[Messages] = []
        self.pairs: list[Pair] = []
        self._places: dict[str, int] = {}

    def position(self, completion: Messages) -> int:
        """Where this completion stands; added if it is new."""
        key = _fingerprint(list(completion))
        if key not in self._places:
            self._places[key] = len(self.completions)
            self.completions.append(completion)
        return self._places[key]


def _fingerprint(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
