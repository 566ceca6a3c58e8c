"""What is learnt about `n`, and what is not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.upstreams.capabilities import Capabilities, Key

KEY: Key = ("u", "m", "chat")


def test_nothing_known_is_worth_a_try() -> None:
    known = Capabilities("auto")
    assert known.worth_asking(KEY, 64) and not known.proven(KEY, 2)


def test_one_choice_means_ignored() -> None:
    known = Capabilities("auto")
    known.learn(KEY, asked=4, received=1)
    assert not known.worth_asking(KEY, 2)
    assert known.worth_asking(("u", "other", "chat"), 2), "each model is learnt by itself"


def test_some_choices_mean_a_cap() -> None:
    known = Capabilities("auto")
    known.learn(KEY, asked=8, received=3)
    assert known.worth_asking(KEY, 3) and not known.worth_asking(KEY, 4)


def test_a_refusal_holds_for_its_size_and_above() -> None:
    known = Capabilities("auto")
    known.learn(KEY, asked=8, received=0)
    assert known.worth_asking(KEY, 7) and not known.worth_asking(KEY, 9)


def test_modes_that_ask_nobody() -> None:
    always, never = Capabilities("n"), Capabilities("parallel")
    always.learn(KEY, 4, 1)
    assert always.worth_asking(KEY, 4) and not never.worth_asking(KEY, 4)


@given(st.integers(2, 20), st.lists(st.integers(2, 40), max_size=30))
def test_a_capped_upstream_is_found_out_and_stays_usable(cap: int, sizes: list[int]) -> None:
    """Against an upstream that refuses above `cap`: every size at most `cap` stays worth asking."""
    known = Capabilities("auto")
    for size in sizes:
        if known.worth_asking(KEY, size):
            known.learn(KEY, size, size if size <= cap else 0)
        assert all(known.worth_asking(KEY, n) for n in range(2, cap + 1))
        if size > cap:
            assert not known.worth_asking(KEY, size)
        assert not known.proven(KEY, cap + 1)


def test_memory_is_bounded() -> None:
    known = Capabilities("auto")
    for number in range(5000):
        known.learn(("u", f"m{number}", "chat"), 4, 1)
    assert known.worth_asking(("u", "m0", "chat"), 4), "the oldest is forgotten"
    assert not known.worth_asking(("u", "m4999", "chat"), 4)
