"""Joining: one piece of work for a request and its retries; ended when nobody is left who wants its answer."""

from __future__ import annotations

import asyncio

import pytest

from proxy.errors import DeadlineError, ProxyError, RejectedError
from proxy.joining import Joining, Linger, StillAtWorkError, comes_again, fingerprint, may_come_again

KEY = b"k"


class Work:
    """Runs until told, and says how it ended."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.answer = asyncio.Event()
        self.ended = asyncio.Event()
        self.cancelled = False

    async def run(self) -> str:
        self.started.set()
        try:
            await self.answer.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            self.ended.set()
        return "answer"


async def leave(waiting: asyncio.Task[str]) -> None:
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


def begin(joining: Joining, work: Work, linger_s: float = 0) -> asyncio.Task[str]:
    return asyncio.create_task(joining.begin(KEY, work.run(), Linger(linger_s)).wait())


def join(joining: Joining) -> asyncio.Task[str]:
    found = joining.find(KEY)
    assert found is not None
    return asyncio.create_task(found.wait())


async def test_both_get_the_one_answer_and_nothing_is_kept() -> None:
    joining, work = Joining(4), Work()
    first = begin(joining, work)
    await work.started.wait()
    second = join(joining)
    await asyncio.sleep(0)
    work.answer.set()
    assert await first == await second == "answer"
    assert len(joining) == 0


async def test_the_first_one_leaving_does_not_harm_the_second() -> None:
    joining, work = Joining(4), Work()
    first = begin(joining, work)
    await work.started.wait()
    second = join(joining)
    await asyncio.sleep(0)
    await leave(first)
    assert not work.ended.is_set()
    work.answer.set()
    assert await second == "answer"


async def test_the_last_one_leaving_ends_the_work_at_once() -> None:
    joining, work = Joining(4), Work()
    first = begin(joining, work)
    await work.started.wait()
    second = join(joining)
    await asyncio.sleep(0)
    await leave(first)
    await leave(second)
    assert work.cancelled
    assert joining.find(KEY) is None


async def test_a_lingering_work_is_joined() -> None:
    joining, work = Joining(4), Work()
    first = begin(joining, work, linger_s=1000)
    await work.started.wait()
    await leave(first)
    assert not work.ended.is_set()
    second = join(joining)
    work.answer.set()
    assert await second == "answer"
    assert len(joining) == 0


async def test_an_answer_that_was_missed_is_fetched_once() -> None:
    joining, work = Joining(4), Work()
    first = begin(joining, work, linger_s=1000)
    await work.started.wait()
    await leave(first)
    work.answer.set()
    await work.ended.wait()
    assert await join(joining) == "answer"
    assert joining.find(KEY) is None


async def test_lingering_ends() -> None:
    joining, work = Joining(4), Work()
    first = begin(joining, work, linger_s=0.01)
    await work.started.wait()
    await leave(first)
    await work.ended.wait()
    assert work.cancelled
    assert len(joining) == 0


async def test_only_so_much_lingers() -> None:
    joining, kept, ended = Joining(1), Work(), Work()
    first = asyncio.create_task(joining.begin(b"a", kept.run(), Linger(1000)).wait())
    second = asyncio.create_task(joining.begin(b"b", ended.run(), Linger(1000)).wait())
    await kept.started.wait()
    await ended.started.wait()
    await leave(first)
    await leave(second)
    assert (kept.cancelled, ended.cancelled) == (False, True)
    await joining.aclose()
    assert kept.cancelled
    assert len(joining) == 0


async def test_of_equal_requests_the_older_does_not_linger_out_of_reach() -> None:
    joining, older, newer = Joining(4), Work(), Work()
    first = begin(joining, older, linger_s=1000)
    second = begin(joining, newer, linger_s=1000)
    await older.started.wait()
    await newer.started.wait()
    await leave(first)
    assert older.cancelled
    joined = join(joining)
    newer.answer.set()
    assert await joined == await second == "answer"


async def test_work_outlasts_a_deadline_for_the_retry_to_join() -> None:
    joining, work = Joining(4), Work()
    shared = joining.begin(KEY, work.run(), Linger(0, 1000))
    with pytest.raises(StillAtWorkError):
        await shared.wait(0.01)
    assert not work.ended.is_set()
    second = join(joining)
    work.answer.set()
    assert await second == "answer"
    assert len(joining) == 0


async def test_a_deadline_ends_the_work_where_nothing_lingers() -> None:
    joining, work = Joining(4), Work()
    shared = joining.begin(KEY, work.run(), Linger(1000, 0))
    with pytest.raises(StillAtWorkError):
        await shared.wait(0.01)
    assert work.cancelled
    assert len(joining) == 0


async def test_one_ones_deadline_is_not_the_others() -> None:
    joining, work = Joining(4), Work()
    first = begin(joining, work)
    await work.started.wait()
    found = joining.find(KEY)
    assert found is not None
    with pytest.raises(StillAtWorkError):
        await found.wait(0.01)
    assert not work.ended.is_set()
    work.answer.set()
    assert await first == "answer"


async def test_all_hear_of_a_failure_and_none_is_kept() -> None:
    joining, work = Joining(4), Work()

    async def fails() -> str:
        await work.answer.wait()
        raise DeadlineError("late")

    first = asyncio.create_task(joining.begin(KEY, fails(), Linger(1000)).wait())
    second = join(joining)
    await asyncio.sleep(0)
    work.answer.set()
    for waiting in (first, second):
        with pytest.raises(DeadlineError):
            await waiting
    assert len(joining) == 0


async def lingering_until(error: ProxyError) -> Joining:
    """With work that nobody waits for, and that raised `error`."""
    joining, work = Joining(4), Work()

    async def fails() -> str:
        await work.run()
        raise error

    shared = joining.begin(KEY, fails(), Linger(1000))
    first = asyncio.create_task(shared.wait())
    await work.started.wait()
    await leave(first)
    work.answer.set()
    await asyncio.wait((shared.task,))
    return joining


async def test_a_failure_that_nobody_waited_for_is_no_noise_and_not_kept() -> None:
    joining = await lingering_until(DeadlineError("late"))
    assert joining.find(KEY) is None
    assert len(joining) == 0
    await joining.aclose()


async def test_a_rejection_that_nobody_waited_for_is_an_answer() -> None:
    joining = await lingering_until(RejectedError("all too low"))
    with pytest.raises(RejectedError):
        await join(joining)
    assert len(joining) == 0


async def test_what_has_failed_does_not_linger() -> None:
    joining, work = Joining(4), Work()

    async def fails() -> str:
        await work.run()
        raise DeadlineError("late")

    shared = joining.begin(KEY, fails(), Linger(1000))
    first = asyncio.create_task(shared.wait())
    await work.started.wait()
    work.answer.set()
    # The client leaves in the same turn of the loop in which the work ends.
    shared.task.add_done_callback(lambda _: first.cancel())
    await asyncio.gather(first, return_exceptions=True)
    assert len(joining) == 0


def test_who_says_to_come_again() -> None:
    assert not may_come_again({})
    assert may_come_again({"x-stainless-retry-count": "0"})
    assert not comes_again({"x-stainless-retry-count": "0"})
    assert comes_again({"x-stainless-retry-count": "2"})
    assert comes_again({"idempotency-key": "a"})


def test_a_fingerprint_is_the_bodys_the_paths_and_the_callers() -> None:
    def of(path: str = "/p", query: str = "", body: bytes = b"{}", **headers: str) -> bytes:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return fingerprint(path, query, named, body)

    same = of(authorization="Bearer a", user_agent="x", x_stainless_retry_count="0")
    assert same == of(authorization="Bearer a", user_agent="y", x_stainless_retry_count="1")
    others = [
        of(),
        of(authorization="Bearer b"),
        of(authorization="Bearer a", path="/q"),
        of(authorization="Bearer a", query="v=1"),
        of(authorization="Bearer a", body=b"{ }"),
        of(authorization="Bearer a", x_winnow_best_of="2"),
        of(authorization="Bearer a", idempotency_key="1"),
        of(authorization="Bearer a", openai_project="p"),
    ]
    assert len({same, *others}) == 1 + len(others)


def test_headers_that_go_upstream_are_part_of_a_fingerprint() -> None:
    mine, yours = {"x-tenant": "a", "user-agent": "x"}, {"x-tenant": "b", "user-agent": "x"}
    assert fingerprint("/p", "", mine, b"") == fingerprint("/p", "", yours, b"")
    assert fingerprint("/p", "", mine, b"", {"x-tenant"}) != fingerprint("/p", "", yours, b"", {"x-tenant"})
