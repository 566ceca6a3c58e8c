"""Groups into micro-batches and steps: nothing lost, nothing doubled, nothing too large."""

from __future__ import annotations

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from feedback.rankings import Pair
from reward.rendering import Rendered
from training.batches import EncodedGroup, epoch_order, flatten, split_by_tokens, step_batches, steps_in_epoch


def encoded(lengths: list[int], pairs: list[Pair] | None = None, source: str = "data") -> EncodedGroup:
    """A group whose completions have these lengths; the ids tell completions apart."""
    items = [
        Rendered([number] * length, length - 1, None, False, length - 1, 1) for number, length in enumerate(lengths)
    ]
    return EncodedGroup(items, pairs or [Pair(0, 1)], source)


GROUPS = st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=5).map(encoded), max_size=25)


@given(GROUPS, st.integers(1, 400))
def test_every_group_is_in_one_micro_batch(groups: list[EncodedGroup], max_tokens: int) -> None:
    batches = split_by_tokens(groups, max_tokens)
    assert sorted(id(group) for batch in batches for group in batch) == sorted(id(group) for group in groups)
    assert all(batches)


@given(GROUPS, st.integers(1, 400))
def test_padded_tokens_are_bounded_unless_a_group_is_alone(groups: list[EncodedGroup], max_tokens: int) -> None:
    for batch in split_by_tokens(groups, max_tokens):
        items = [item for group in batch for item in group.items]
        assert len(batch) == 1 or max(map(len, items)) * len(items) <= max_tokens


@given(GROUPS.filter(bool))
def test_flattened_pairs_point_at_their_own_completions(groups: list[EncodedGroup]) -> None:
    batch = flatten(groups)
    expected = [(group.items[p.better], group.items[p.worse]) for group in groups for p in group.pairs]
    found = [
        (batch.items[better], batch.items[worse])
        for better, worse in zip(batch.better.tolist(), batch.worse.tolist(), strict=True)
    ]
    assert all(a is c and b is d for (a, b), (c, d) in zip(expected, found, strict=True))
    assert batch.num_pairs == len(expected)


def test_each_group_weighs_one_however_many_pairs_it_has() -> None:
    many = encoded([1, 2, 3], [Pair(0, 1), Pair(0, 2), Pair(1, 2)])
    sure = encoded([1, 2], [Pair(1, 0, weight=3.0, margin=0.5), Pair(0, 1)])
    batch = flatten([many, sure])
    assert batch.better.tolist() == [0, 0, 1, 4, 3]
    assert batch.worse.tolist() == [1, 2, 2, 3, 4]
    assert batch.weights[:3].sum().item() == 1.0
    assert batch.weights[3:].tolist() == [1.5, 0.5]
    assert batch.margins.tolist() == [0.0, 0.0, 0.0, 0.5, 0.0]


@given(st.integers(0, 60), st.integers(0, 5), st.integers(0, 5))
def test_an_epochs_order_is_a_permutation_and_repeatable(num_groups: int, seed: int, epoch: int) -> None:
    order = epoch_order(num_groups, seed, epoch)
    assert sorted(order) == list(range(num_groups))
    assert order == epoch_order(num_groups, seed, epoch)


def test_epochs_and_seeds_differ_in_order() -> None:
    assert len({tuple(epoch_order(20, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 3))
def test_steps_cover_each_epoch_once(num_groups: int, batch_size: int, epochs: int) -> None:
    in_epoch = steps_in_epoch(num_groups, batch_size)
    steps = list(step_batches(num_groups, batch_size, 7, epochs * in_epoch))
    assert len(steps) == epochs * in_epoch
    for epoch in range(epochs):
        own = steps[epoch * in_epoch : (epoch + 1) * in_epoch]
        assert sorted(group for step in own for group in step) == list(range(num_groups))
        assert all(len(step) == batch_size for step in own[:-1])


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 30), st.data())
def test_a_resumed_run_sees_the_same_steps(
    num_groups: int, batch_size: int, num_steps: int, data: st.DataObject
) -> None:
    done = data.draw(st.integers(0, num_steps))
    whole = list(step_batches(num_groups, batch_size, 7, num_steps))
    assert list(islice(step_batches(num_groups, batch_size, 7, num_steps), done, None)) == whole[done:]
