"""When a draw gives its slower calls up, without a network."""

from __future__ import annotations

import asyncio

from proxy.candidates import Call, CallFailure, Candidate
from proxy.patience import Patience, Waiting
from proxy.strategies.history import LatestValues

FAILED = CallFailure("broken", "broken")


def patience(
    quorum: int | None = None, *, factor: float = 0.0, least_s: float = 0.0, least: int = 1, good: bool = True
) -> Patience:
    return Patience(quorum, factor, least_s, least, lambda candidate: good)


def waiting(of: Patience, count: int) -> tuple[Waiting, asyncio.Event]:
    given_up = asyncio.Event()
    return Waiting(of, count, given_up.set), given_up


def candidate(failure: CallFailure | None = None) -> Candidate:
    return Candidate(0, Call(0.0), failure)


async def test_a_quorum_ends_the_waiting() -> None:
    wait, given_up = waiting(patience(2), 4)
    wait.arrived(candidate())
    assert not given_up.is_set()
    wait.arrived(candidate())
    assert given_up.is_set()


async def test_failures_and_invalid_answers_are_no_part_of_a_quorum() -> None:
    wait, given_up = waiting(patience(1, good=False), 4)
    wait.arrived(candidate())
    wait.arrived(candidate(FAILED))
    assert not given_up.is_set()


async def test_stragglers_are_given_up_after_half_are_there() -> None:
    wait, given_up = waiting(patience(factor=2.0), 4)
    wait.arrived(candidate(FAILED))
    wait.arrived(candidate())
    await asyncio.sleep(0)
    assert not given_up.is_set()
    wait.arrived(candidate())
    await asyncio.wait_for(given_up.wait(), 5)


async def test_failed_calls_are_not_among_those_that_half_are_counted_of() -> None:
    wait, given_up = waiting(patience(factor=2.0), 4)
    wait.arrived(candidate(FAILED))
    wait.arrived(candidate(FAILED))
    await asyncio.sleep(0)
    assert not given_up.is_set(), "nothing is there yet"
    wait.arrived(candidate())
    await asyncio.wait_for(given_up.wait(), 5)


async def test_stragglers_are_given_up_with_a_quorum_that_hung_calls_keep_from_coming() -> None:
    wait, given_up = waiting(patience(2, factor=2.0), 8)
    wait.arrived(candidate())
    await asyncio.wait_for(given_up.wait(), 5)


async def test_invalid_answers_do_not_make_hung_calls_worth_waiting_for() -> None:
    wait, given_up = waiting(patience(2, factor=2.0, good=False), 4)
    wait.arrived(candidate())
    wait.arrived(candidate())
    await asyncio.wait_for(given_up.wait(), 5)


async def test_nothing_is_given_up_without_the_answers_that_the_request_needs() -> None:
    wait, given_up = waiting(patience(factor=2.0, least=3), 4)
    wait.arrived(candidate())
    wait.arrived(candidate())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not given_up.is_set()
    wait.arrived(candidate())
    await asyncio.wait_for(given_up.wait(), 5)


class TestOutlastingTheDeadline:
    """In the loop's time, where 0 has passed."""

    async def test_soon_after_the_first_answers_it_is_enough(self) -> None:
        given_up = asyncio.Event()
        wait = Waiting(patience(least=2), 4, given_up.set, deadline=0.0)
        wait.arrived(candidate())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert wait.is_overdue and not given_up.is_set()
        wait.arrived(candidate(FAILED))
        await asyncio.sleep(0)
        assert not given_up.is_set()
        wait.arrived(candidate())
        await asyncio.wait_for(given_up.wait(), 5)

    async def test_with_enough_of_them_it_is_the_end(self) -> None:
        given_up = asyncio.Event()
        wait = Waiting(patience(), 4, given_up.set, deadline=0.0)
        wait.arrived(candidate())
        await asyncio.wait_for(given_up.wait(), 5)

    async def test_closed_it_passes_unnoticed(self) -> None:
        given_up = asyncio.Event()
        wait = Waiting(patience(), 4, given_up.set, deadline=0.0)
        wait.arrived(candidate())
        wait.close()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not given_up.is_set()


async def test_it_gives_up_once() -> None:
    given_up: list[bool] = []
    wait = Waiting(patience(1, good=True), 4, lambda: given_up.append(True))
    wait.arrived(candidate())
    wait.arrived(candidate(FAILED))
    wait.arrived(candidate())
    assert given_up == [True]


class TestWhatTheRouteHasTaught:
    """Cold, stragglers get 4 times as long and 10 s at least; learnt, 1.5 times what is usual."""

    def limit(self, usual_s: float, slowest_s: float, *, num_known: int = 32, half_there: bool = True) -> float | None:
        durations = LatestValues()
        for _ in range(num_known):
            durations.keep(usual_s)
        taught = Patience(None, 4.0, 10.0, 1, lambda candidate: True, 1.5, durations)
        return taught.limit_s(slowest_s, half_there=half_there)

    def test_a_route_of_short_answers_is_waited_for_shortly(self) -> None:
        assert self.limit(0.2, 0.2) == 1.2  # a second more, be it ever so quick
        assert self.limit(4.0, 4.0) == 8.0  # twice as long as the rest
        assert self.limit(8.0, 4.0) == 12.0  # half as long again as usual

    def test_before_it_knows_enough_the_prompts_own_answers_say_how_long(self) -> None:
        assert self.limit(0.2, 0.2, num_known=31) == 10.2
        assert self.limit(0.2, 4.0, num_known=31) == 16.0

    def test_a_slow_route_allows_no_more_than_the_prompts_own_answers_do(self) -> None:
        assert self.limit(60.0, 1.0) == 11.0

    def test_it_knows_that_others_hang_before_half_are_there(self) -> None:
        assert self.limit(0.2, 0.2, num_known=31, half_there=False) is None
        assert self.limit(0.2, 0.2, half_there=False) == 1.2
        assert self.limit(2.0, 0.2, half_there=False) == 8.0  # it may be a refusal, and the others long

    def test_without_a_factor_there_is_no_limit(self) -> None:
        durations = LatestValues()
        for _ in range(32):
            durations.keep(0.1)
        assert Patience(None, 0.0, 0.0, 1, bool, 1.5, durations).limit_s(0.1, half_there=True) is None

    async def test_answers_teach_and_failures_do_not(self) -> None:
        durations = LatestValues()
        wait, _ = waiting(Patience(None, 4.0, 10.0, 1, lambda candidate: True, 1.5, durations), 3)
        wait.arrived(candidate())
        wait.arrived(candidate(FAILED))
        wait.close()
        assert len(durations) == 1


def test_the_latest_values_are_kept_in_order_and_their_quantiles_are_values() -> None:
    latest = LatestValues(most=20)
    for value in (99.0, *map(float, range(20, 0, -1))):
        latest.keep(value)
    assert latest.ordered == list(map(float, range(1, 21)))
    assert (latest.quantile(0.95), latest.quantile(1.0), latest.quantile(0.0)) == (19.0, 20.0, 1.0)


async def test_without_a_factor_all_are_waited_for() -> None:
    wait, given_up = waiting(patience(), 2)
    wait.arrived(candidate())
    await asyncio.sleep(0)
    assert not given_up.is_set()


async def test_closed_it_gives_nothing_up() -> None:
    wait, given_up = waiting(patience(factor=2.0), 2)
    wait.arrived(candidate())
    wait.close()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not given_up.is_set()
