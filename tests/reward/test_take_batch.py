from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.batching import BatchingOptions, take_batch

waiting = st.lists(st.integers(1, 300), min_size=1, max_size=40)
limits = st.builds(
    BatchingOptions, max_batch_tokens=st.integers(1, 2000), max_batch_size=st.integers(1, 16), max_queue=st.just(1000)
)


def test_nothing_waits() -> None:
    assert take_batch([], BatchingOptions()) == []


def test_those_nearest_in_length_join_the_oldest() -> None:
    # 100 is oldest; 90 and 110 are nearest; a fourth would make 4 × 110 > 400.
    assert take_batch([100, 10, 90, 300, 110, 50], BatchingOptions(max_batch_tokens=400)) == [0, 2, 4]


def test_older_goes_first_among_equals() -> None:
    assert take_batch([5] * 5, BatchingOptions(max_batch_size=3)) == [0, 1, 2]


def test_one_that_would_not_fit_does_not_keep_others_out() -> None:
    # 14 is nearer to 10 than 5 is, but 2 × 14 > 20.
    assert take_batch([10, 14, 5], BatchingOptions(max_batch_tokens=20)) == [0, 2]


@given(waiting, limits)
def test_a_batch_keeps_its_limits(lengths: list[int], options: BatchingOptions) -> None:
    batch = take_batch(lengths, options)
    assert batch[0] == 0
    assert len(set(batch)) == len(batch) <= options.max_batch_size
    assert set(batch) <= set(range(len(lengths)))
    padded = max(lengths[i] for i in batch) * len(batch)
    assert len(batch) == 1 or padded <= options.max_batch_tokens


@given(waiting, limits)
def test_nobody_is_left_out_who_would_cost_nothing(lengths: list[int], options: BatchingOptions) -> None:
    """A batch that is not full has no room, within its own width, for any of those that still wait."""
    batch = take_batch(lengths, options)
    width = max(lengths[i] for i in batch)
    fits_one_more = len(batch) < options.max_batch_size and width * (len(batch) + 1) <= options.max_batch_tokens
    if fits_one_more:
        assert all(lengths[i] > width for i in range(len(lengths)) if i not in batch)


def test_padding_is_bounded_where_asked() -> None:
    # 100 beside 60: 40 of 200 tokens are padding, exactly a fifth; 50 would be more.
    assert take_batch([100, 60, 50], BatchingOptions(max_padding=0.2)) == [0, 1]
    assert take_batch([100, 50], BatchingOptions(max_padding=0)) == [0]


@given(waiting, st.floats(0, 1))
def test_no_batch_holds_more_padding_than_allowed(lengths: list[int], max_padding: float) -> None:
    batch = take_batch(lengths, BatchingOptions(max_padding=max_padding))
    padded = max((lengths[i] for i in batch), default=0) * len(batch)
    assert padded - sum(lengths[i] for i in batch) <= max_padding * padded + 1e-6


@given(waiting, limits)
def test_repeated_batches_take_everyone_once_and_the_oldest_first(lengths: list[int], options: BatchingOptions) -> None:
    left = list(range(len(lengths)))
    while left:
        batch = [left[i] for i in take_batch([lengths[i] for i in left], options)]
        assert left[0] == batch[0]
        left = [i for i in left if i not in batch]


@pytest.mark.parametrize("name", ["max_batch_tokens", "max_batch_size", "max_queue"])
def test_a_limit_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        BatchingOptions(**{name: 0})
