"""Where a round's comparisons come from: a scorer that stands for people, people's files, or their store."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import SecretStr

from feedback.jsonl import read_records, write_records
from feedback.judgements import CandidateSet, StoredCandidate, StoreError, as_json, training_records
from feedback.rankings import ranks_of
from feedback.records import (
    Completions,
    Messages,
    Preference,
    Ranking,
    parse_completions,
    parse_preference,
    parse_ranking,
)
from feedback.store import DatabaseStore
from training.evaluation import completion_text
from training.options import OptionsError
from training.rlhf_options import RankOptions

ROUTE = "rlhf"
"""Of what the loop puts into the feedback store."""
TO_JUDGE = "to-judge.jsonl"
"""What was put there, by the ids that judgements name."""


class AwaitingPeopleError(OptionsError):
    """A round cannot go on before people have ranked more. The message says what and where."""


class Score(Protocol):
    """Scores completions."""

    def __call__(self, prompts: Sequence[Messages], completions: Sequence[str]) -> list[float]:
        """A number each."""


def scores_by_prompt(score: Score, asked: Sequence[tuple[Messages, Sequence[Messages]]]) -> list[list[float]]:
    """Of every completion of every prompt, asked for at once."""
    pairs = [(prompt, completion_text(one)) for prompt, completions in asked for one in completions]
    found = iter(score([prompt for prompt, _ in pairs], [text for _, text in pairs]))
    return [[next(found) for _ in completions] for _, completions in asked]


def ranked_by(score: Score, drawn: Iterable[Completions], source: str) -> list[dict[str, Any]]:
    """Rankings of what was drawn, by a scorer."""
    records = list(drawn)
    scores = scores_by_prompt(score, [(one.prompt, one.completions) for one in records])
    return [
        {
            "source": source,
            "prompt": list(one.prompt),
            "completions": [list(completion) for completion in one.completions],
            "ranks": ranks_of(rewards),
            "rewards": rewards,
        }
        for one, rewards in zip(records, scores, strict=True)
    ]


def peoples_rankings(rank: RankOptions, number: int, samples: Path, earlier: Sequence[Path]) -> list[dict[str, Any]]:
    """What people said that is in no file of `earlier`. With a store, what was drawn is first put there.

    Raises `AwaitingPeopleError` while that is less than `min_new`.
    """
    if rank.database is not None:
        found = _stored(rank.database, number, samples)
        where = f"judge what round {number} drew in the feedback store ({samples.with_name(TO_JUDGE)} has the ids)"
    else:
        files = [Path(file.replace("{round}", str(number))).expanduser() for file in rank.files]
        found = [as_json(one) for one in read_records([file for file in files if file.is_file()], _parse_judged)]
        where = f"rank the completions in {samples} into {', '.join(map(str, files))}"
    known = {_digest(record) for file in earlier for record in map(as_json, read_records([file], _parse_judged))}
    new = [record for record in found if _digest(record) not in known]
    if len(new) < rank.min_new:
        raise AwaitingPeopleError(
            f"round {number} has {len(new)} new rankings of the {rank.min_new} that it waits for: {where}, "
            "then give the same command again"
        )
    return new


def require_store(rank: RankOptions) -> None:
    """Raises `OptionsError` for a `database` that names none; it is reached when it is needed."""
    if rank.database is not None:
        _store(rank.database).close()


def _store(url: SecretStr) -> DatabaseStore:
    try:
        return DatabaseStore(url.get_secret_value())
    except ValueError as error:
        raise OptionsError(
            "rank.database: names no database, as sqlite:///feedback.db or postgresql://… would"
        ) from error


def _stored(url: SecretStr, number: int, samples: Path) -> list[dict[str, Any]]:
    """Raises `OptionsError` where the store cannot be reached."""
    store = _store(url)
    try:
        store.open()
        store.add_sets(list(_candidate_sets(number, samples)))
        write_records(samples.with_name(TO_JUDGE), _to_judge(samples))
        return [as_json(one) for one in training_records(store.judged_sets()) if isinstance(one, Preference | Ranking)]
    except StoreError as error:
        raise OptionsError(f"rank.database: {error}; mend it and give the same command again") from error
    finally:
        store.close()


def set_id(drawn: Completions) -> str:
    """What a judgement of these completions names, as `completion_id`; the same completions have the same."""
    words = json.dumps([list(drawn.prompt), [list(one) for one in drawn.completions]], sort_keys=True)
    return f"{ROUTE}-{hashlib.sha256(words.encode()).hexdigest()[:32]}"


def _to_judge(samples: Path) -> Iterator[dict[str, Any]]:
    for one in read_records([samples], parse_completions):
        completions = [list(completion) for completion in one.completions]
        yield {"completion_id": set_id(one), "prompt": list(one.prompt), "completions": completions}


def _candidate_sets(number: int, samples: Path) -> Iterator[CandidateSet]:
    """What was drawn, as the store keeps what was served; what is there already stays as it is."""
    for one in read_records([samples], parse_completions):
        yield CandidateSet(
            completion_id=set_id(one),
            created=time.time(),
            route=ROUTE,
            endpoint=f"round-{number}",
            model=None,
            reward_model=None,
            strategy="sample",
            prompt=one.prompt,
            candidates=[StoredCandidate(k, completion[-1], valid=True) for k, completion in enumerate(one.completions)],
            winner=0,
            accepted=True,
        )


def _parse_judged(record: Mapping[str, Any]) -> Preference | Ranking:
    return parse_ranking(record) if "ranks" in record else parse_preference(record)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
