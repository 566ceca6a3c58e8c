"""Which sampled completions are good enough to learn from: the best of each prompt, by reward. Pure functions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from feedback.records import Message, Messages
from reward.rendering import content_text
from training.sampling import prompt_key

CUT_OFF = ("length", "content_filter")
"""Finish reasons of completions that somebody else ended: learnt from, they would teach to end in the middle."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What makes a winner."""

    per_prompt: int = 1
    """Most winners of one prompt."""
    min_reward: float | None = None
    """Least normalised reward."""
    min_percentile: float | None = None
    """Least percentile among the reward model's references, from 0 to 100."""
    top_share: float = 1.0
    """Share of the remaining winners that are kept, those with the highest rewards of all."""
    keep_cut_off: bool = False
    """Take completions too that ended at their token limit."""


@dataclass(frozen=True, slots=True)
class Winner:
    """A completion to learn from."""

    prompt: Messages
    completion: Messages
    reward: float
    id: str | None = None
    source: str | None = None

    def as_record(self) -> dict[str, Any]:
        """A demonstration."""
        identity = {"id": self.id, "source": self.source}
        return {
            **{name: value for name, value in identity.items() if value is not None},
            "prompt": list(self.prompt),
            "completion": list(self.completion),
            "reward": self.reward,
        }


@dataclass(frozen=True, slots=True)
class Selection:
    """What choosing came to. Every completion is counted once: as a winner or for the first reason it is none."""

    prompts: int
    """Different ones."""
    completions: int
    cut_off: int
    """Ended by a limit or a filter."""
    empty: int
    repeated: int
    """Said before, word for word, to the same prompt."""
    outdone: int
    """Others of the prompt were better."""
    too_low: int
    """Under the least reward or percentile."""
    not_top: int
    """Not among the best share of all."""
    winners: int
    mean_reward: float
    """Of all completions."""
    winners_mean_reward: float | None
    """None without winners."""

    def as_record(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Entry:
    winner: Winner
    percentile: float | None


def select_winners(records: Iterable[Mapping[str, Any]], rules: Rules) -> tuple[list[Winner], Selection]:
    """The winners of scored samples (`rewards`, `percentiles`, `finish_reasons` beside `completions`), in their order.

    Records of one prompt are taken together. Of equal rewards the earlier completion wins. Raises ValueError where a
    percentile is asked for and the reward model told none.
    """
    by_prompt: dict[str, list[_Entry]] = {}
    counts = dict.fromkeys(("cut_off", "empty", "repeated", "outdone", "too_low", "not_top"), 0)
    rewards: list[float] = []
    said: set[tuple[str, str]] = set()
    for record in records:
        key = prompt_key(record["prompt"])
        entries = by_prompt.setdefault(key, [])
        for place, completion in enumerate(record["completions"]):
            rewards.append(record["rewards"][place])
            if (reason := _unusable(record, place, completion, rules)) is not None:
                counts[reason] += 1
                continue
            words = json.dumps(completion, sort_keys=True)
            if (key, words) in said:
                counts["repeated"] += 1
                continue
            said.add((key, words))
            winner = Winner(record["prompt"], completion, rewards[-1], record.get("id"), record.get("source"))
            entries.append(_Entry(winner, record["percentiles"][place]))
    best: list[Winner] = []
    for entries in by_prompt.values():
        first = sorted(range(len(entries)), key=lambda place: -entries[place].winner.reward)[: rules.per_prompt]
        counts["outdone"] += len(entries) - len(first)
        good = [entries[place].winner for place in sorted(first) if _is_good(entries[place], rules)]
        counts["too_low"] += len(first) - len(good)
        best += good
    kept = _top(best, rules.top_share)
    counts["not_top"] = len(best) - len(kept)
    return kept, Selection(
        prompts=len(by_prompt),
        completions=len(rewards),
        winners=len(kept),
        mean_reward=math.fsum(rewards) / max(len(rewards), 1),
        winners_mean_reward=math.fsum(one.reward for one in kept) / len(kept) if kept else None,
        **counts,
    )


def _unusable(record: Mapping[str, Any], place: int, completion: Sequence[Message], rules: Rules) -> str | None:
    if not rules.keep_cut_off and record["finish_reasons"][place] in CUT_OFF:
        return "cut_off"
    has_words = any(content_text(message).strip() or message.get("tool_calls") for message in completion)
    return None if has_words else "empty"


def _is_good(entry: _Entry, rules: Rules) -> bool:
    if rules.min_reward is not None and entry.winner.reward < rules.min_reward:
        return False
    if rules.min_percentile is None:
        return True
    if entry.percentile is None:
        raise ValueError("the reward model knows no references, and so no percentiles: give a number")
    return entry.percentile >= rules.min_percentile


def _top(winners: Sequence[Winner], share: float) -> list[Winner]:
    """The best share, at least one where there is any, in the order they came."""
    count = math.ceil(share * len(winners) - 1e-9)  # 0.07 · 100 is a little more than 7
    places = sorted(range(len(winners)), key=lambda place: -winners[place].reward)[:count]
    return [winners[place] for place in sorted(places)]
