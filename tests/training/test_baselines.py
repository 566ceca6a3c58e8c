"""Bags of words: they learn what words can say, and nothing that they cannot see."""

from __future__ import annotations

from pathlib import Path

import pytest

from feedback.jsonl import Skipped
from feedback.rankings import ComparisonGroup, Pair
from tests.training import tasks
from training.baselines import WordsBaseline, own_words_rewards
from training.comparisons import read_comparisons
from training.evaluation import accuracy_of, pair_outcomes


def comparisons(path: Path) -> list[ComparisonGroup]:
    return read_comparisons([str(path)], False, Skipped())


@pytest.fixture(scope="module")
def zig(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[ComparisonGroup], list[ComparisonGroup]]:
    home = tmp_path_factory.mktemp("words")
    train = tasks.write_preferences(home / "a.jsonl", 60, seed=1)
    held_out = tasks.write_preferences(home / "b.jsonl", 40, seed=2)
    return comparisons(train), comparisons(held_out)


@pytest.fixture(scope="module")
def zag(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[ComparisonGroup], list[ComparisonGroup]]:
    home = tmp_path_factory.mktemp("words")
    train = tasks.write_preferences(home / "a.jsonl", 60, seed=3, source="zag", wanted=tasks.ZAG)
    held_out = tasks.write_preferences(home / "b.jsonl", 40, seed=4, source="zag", wanted=tasks.ZAG)
    return comparisons(train), comparisons(held_out)


@pytest.mark.parametrize("with_length", [False, True])
def test_words_beat_chance_where_words_tell(
    zig: tuple[list[ComparisonGroup], list[ComparisonGroup]], with_length: bool
) -> None:
    train, held_out = zig
    rewards = WordsBaseline(with_length=with_length).fit(train).rewards(held_out)
    found = accuracy_of(pair_outcomes(held_out, rewards))
    assert found.accuracy > 0.95
    assert found.low > 0.5


def test_length_is_a_feature_only_when_asked_for() -> None:
    def group(number: int) -> ComparisonGroup:
        words = "same words here"
        return ComparisonGroup(
            [{"role": "user", "content": str(number)}],
            [[{"role": "assistant", "content": " ".join([words] * 3)}], [{"role": "assistant", "content": words}]],
            [Pair(0, 1)],
            "s",
        )

    groups = [group(number) for number in range(10)]
    long, short = WordsBaseline(with_length=True).fit(groups).rewards(groups[:1])
    assert long > short


def test_each_source_has_its_own_words(
    zig: tuple[list[ComparisonGroup], list[ComparisonGroup]], zag: tuple[list[ComparisonGroup], list[ComparisonGroup]]
) -> None:
    """Where sources contradict each other, one bag of words is at chance and one a source is not."""
    train, held_out = zig[0] + zag[0], zig[1] + zag[1]
    own = accuracy_of(pair_outcomes(held_out, own_words_rewards(train, held_out, with_length=True)))
    on_all = accuracy_of(pair_outcomes(held_out, WordsBaseline(with_length=True).fit(train).rewards(held_out)))
    assert own.accuracy > 0.95
    assert on_all.accuracy < 0.75


def test_a_source_without_training_data_gets_the_common_words(
    zig: tuple[list[ComparisonGroup], list[ComparisonGroup]],
) -> None:
    train, held_out = zig
    renamed = [ComparisonGroup(g.prompt, g.completions, g.pairs, "unseen") for g in held_out]
    assert own_words_rewards(train, renamed, with_length=True) == pytest.approx(
        WordsBaseline(with_length=True).fit(train).rewards(held_out)
    )
