"""Rewards by rule, to try a trainer with: cheap, known exactly, and with an optimum that can be read off the text.

Named in a configuration as `reward.function: training.rule_rewards:capitalised_words`. They show what a function of
your own looks like.
"""

from __future__ import annotations

from collections.abc import Sequence

from feedback.records import Messages


def capitalised_words(prompts: Sequence[Messages], completions: Sequence[str]) -> list[float]:
    """Share of a completion's words that begin with a capital letter; 0 without words. The optimum is 1."""
    return [_share([word[0].isupper() for word in text.split()]) for text in completions]


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else 0.0
