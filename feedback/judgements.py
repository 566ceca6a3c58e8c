"""What was served, what people said of it, and the training records that follow from both.

How a judgement was asked for stays with it, as the record's `source`: ratings, choices and rankings of the same people
disagree on a good part of the same items (arXiv 2308.15812), so they must never be mixed unseen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from feedback.records import Demonstration, Message, Messages, Preference, Ranking

Record = Demonstration | Preference | Ranking


@dataclass(frozen=True, slots=True)
class StoredCandidate:
    """One completion of a candidate set."""

    index: int
    message: Message
    valid: bool
    reason: str | None = None
    """Why it is not valid."""
    reward: float | None = None
    raw_reward: float | None = None
    percentile: float | None = None
    finish_reason: str | None = None
    usage: Mapping[str, Any] | None = None
    failed: bool = False
    """Its upstream call brought nothing: there is no completion to judge."""
    std: float | None = None
    """How far the heads of an ensemble disagreed on `reward`."""
    objectives: Mapping[str, float] | None = None
    """Of a reward model with several: the reward for each."""


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """All candidates of one prompt, and which of them was served."""

    completion_id: str
    created: float
    """Seconds since the epoch."""
    route: str
    endpoint: str
    model: str | None
    reward_model: str | None
    strategy: str
    prompt: Messages
    candidates: Sequence[StoredCandidate]
    winner: int
    """Index of the best candidate."""
    accepted: bool
    policy: Mapping[str, Any] = field(default_factory=dict)
    """How it came about: best_of, min_reward, what a rejection led to, sampling parameters, tokens and cost."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What somebody said of a candidate set. At least one of the fields from `rating` to `comment` is there."""

    completion_id: str
    rating: int | None = None
    """-1, 0, 1 or 1 to 7."""
    preferred: int | None = None
    ranking: Sequence[Sequence[int]] | None = None
    """Candidates' indices, best group first; those of one group are tied."""
    correction: str | None = None
    labels: Mapping[str, Any] | None = None
    comment: str | None = None
    annotator: str | None = None

    def fingerprint(self) -> str:
        """Equal for a repeat of the same words by the same annotator."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class StoredJudgement:
    """A judgement that is on disk."""

    id: str
    created: float
    judgement: Judgement
    repeated: bool = False
    """It was there already: the same words by the same annotator."""


class StoreError(Exception):
    """The store cannot be reached or refuses. The message names no parameters: those are people's words."""


class RefusedError(StoreError):
    """What was to be written is not taken, now or later: trying again is no use."""


class FeedbackStore(Protocol):
    """Where candidate sets and judgements are kept. Calls block: not for the event loop. Safe to call from threads.

    All raise `StoreError`. What a call has returned from is durable.
    """

    def open(self) -> None:
        """Connects and brings the tables up to date."""

    def add_sets(self, sets: Sequence[CandidateSet]) -> None:
        """All or none; one that is there already stays as it is."""

    def candidate_set(self, completion_id: str) -> CandidateSet | None: ...

    def add_judgement(self, judgement: Judgement, unwritten: CandidateSet | None = None) -> StoredJudgement:
        """`unwritten` is the set that it is about, where that may not have been added yet."""

    def judged_sets(self) -> Iterator[tuple[CandidateSet, Sequence[StoredJudgement]]]:
        """Every set that somebody judged, with its judgements, oldest first."""

    def close(self) -> None: ...


def training_records(judged: Iterable[tuple[CandidateSet, Sequence[StoredJudgement]]]) -> Iterator[Record]:
    """Rankings from `ranking` and `preferred`, preferences and demonstrations from `correction`.

    Of what one annotator said of one set, in one way, the last word counts; nameless ones count each. A rating alone
    compares nothing. Failed candidates and corrections equal to what they correct give no record.
    """
    for candidate_set, judgements in judged:
        for way in ("ranking", "preferred", "correction"):
            said = [one for one in judgements if getattr(one.judgement, way) is not None]
            last = {one.judgement.annotator or one.id: one for one in said}
            for one in last.values():
                yield from _records(candidate_set, one, way)


def as_json(record: Record) -> dict[str, Any]:
    """As it stands in a file; `parse_demonstration`, `parse_preference` and `parse_ranking` read it back."""
    return {name: value for name, value in asdict(record).items() if value is not None}


def _records(candidate_set: CandidateSet, stored: StoredJudgement, way: str) -> Iterator[Record]:
    judgement = stored.judgement
    if way == "correction":
        yield from _corrected(candidate_set, stored)
    elif way == "ranking" and judgement.ranking is not None:
        yield from _ranked(candidate_set, stored, judgement.ranking, way)
    elif judgement.preferred is not None:
        others = [one.index for one in candidate_set.candidates if one.index != judgement.preferred]
        yield from _ranked(candidate_set, stored, [[judgement.preferred], others], way)


def _ranked(
    candidate_set: CandidateSet, stored: StoredJudgement, groups: Sequence[Sequence[int]], way: str
) -> Iterator[Ranking]:
    there = {one.index: one for one in candidate_set.candidates if not one.failed}
    places = [(index, rank) for rank, group in enumerate(groups, start=1) for index in group if index in there]
    if len({rank for _, rank in places}) < 2:
        return
    yield Ranking(
        prompt=candidate_set.prompt,
        completions=[[there[index].message] for index, _ in places],
        ranks=[rank for _, rank in places],
        id=stored.id,
        source=f"feedback/{way}",
    )


def _corrected(candidate_set: CandidateSet, stored: StoredJudgement) -> Iterator[Demonstration | Preference]:
    written: Message = {"role": "assistant", "content": stored.judgement.correction}
    served = next((one for one in candidate_set.candidates if one.index == candidate_set.winner), None)
    source = "feedback/correction"
    yield Demonstration(candidate_set.prompt, [written], id=stored.id, source=source)
    if served is not None and not served.failed and served.message.get("content") != written["content"]:
        yield Preference(candidate_set.prompt, [written], [served.message], id=stored.id, source=source)
