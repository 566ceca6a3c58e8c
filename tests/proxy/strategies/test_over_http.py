"""Adaptive drawing, quorums and deadlines through the real client; upstream calls counted where they arrive."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.conftest import RunningProxy, StartProxy
from tests.fakes.upstream import Received, Reply, error_reply

MESSAGES = [{"role": "user", "content": "Say something."}]


def ask(proxy: RunningProxy, **kwargs: Any) -> Any:
    return proxy.client.chat.completions.with_raw_response.create(**({"model": "m", "messages": MESSAGES} | kwargs))


def text_of(raw: Any, stream: bool) -> str:
    if stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in raw.parse() if chunk.choices)
    return str(raw.parse().choices[0].message.content)


def adaptive(**more: Any) -> dict[str, Any]:
    return {"winnow": {"strategy": "adaptive", **more}}


@pytest.mark.parametrize("stream", [False, True])
class TestAdaptive:
    def test_a_good_first_wave_is_enough(self, start_proxy: StartProxy, stream: bool) -> None:
        proxy = start_proxy(route={"best_of": 12}, upstream={"n_mode": "parallel"})
        proxy.upstream.script = lambda received: Reply(texts=("good good good good good good", "so", "so", "bad"))
        raw = ask(proxy, stream=stream, extra_body=adaptive())
        assert text_of(raw, stream).startswith("good")
        assert raw.headers["x-winnow-strategy"] == "adaptive"
        assert raw.headers["x-winnow-best-of"] == "12"
        assert raw.headers["x-winnow-candidates"] == "s=4;f=0;i=0"
        assert len(proxy.upstream.received) == 4

    def test_a_poor_wave_is_followed_by_others_up_to_best_of(self, start_proxy: StartProxy, stream: bool) -> None:
        proxy = start_proxy(route={"best_of": 10, "stop_cost": 0.001}, upstream={"n_mode": "parallel"})
        proxy.upstream.script = lambda received: Reply(texts=(("bad ", "so ")[received.number % 2] * 2,))
        raw = ask(proxy, stream=stream, extra_body=adaptive())
        assert raw.headers["x-winnow-candidates"] == "s=10;f=0;i=0"
        assert len(proxy.upstream.received) == 10

    def test_under_min_reward_it_goes_on_to_max_candidates(self, start_proxy: StartProxy, stream: bool) -> None:
        proxy = start_proxy(route={"best_of": 4, "stop_cost": 100})
        raw = ask(proxy, stream=stream, extra_body=adaptive(min_reward=5, max_candidates=6))
        assert raw.headers["x-winnow-candidates"] == "s=6;f=0;i=0"
        assert raw.headers["x-winnow-accepted"] == "false"

    def test_reaching_min_reward_may_be_enough(self, start_proxy: StartProxy, stream: bool) -> None:
        proxy = start_proxy(route={"best_of": 12, "stop_cost": 0, "stop_at_min_reward": True})
        proxy.upstream.script = lambda received: Reply(texts=("good", "so", "so", "so"))
        raw = ask(proxy, stream=stream, extra_body=adaptive(min_reward=1))
        assert raw.headers["x-winnow-candidates"] == "s=4;f=0;i=0"

    def test_a_refusing_upstream_is_asked_for_one_wave_only(self, start_proxy: StartProxy, stream: bool) -> None:
        proxy = start_proxy(route={"best_of": 12}, upstream={"n_mode": "parallel"})
        proxy.upstream.script = lambda received: error_reply(401)
        with pytest.raises(openai.AuthenticationError):
            ask(proxy, stream=stream, extra_body=adaptive())
        assert len(proxy.upstream.received) == 4


def test_the_route_learns_what_its_rewards_look_like(start_proxy: StartProxy) -> None:
    """The same rewards are worth another wave where they are poor for the route, and none where they are the best."""
    proxy = start_proxy(route={"best_of": 8, "strategy": "adaptive", "stop_cost": 0.3})
    script = ("good good", "good", "good", "")
    proxy.upstream.script = lambda received: Reply(texts=script[:3])
    first = ask(proxy).headers["x-winnow-candidates"]
    proxy.upstream.script = lambda received: Reply(texts=("good " * 40, "good " * 10, "good " * 25, "good"))
    for _ in range(20):
        ask(proxy)
    proxy.upstream.script = lambda received: Reply(texts=script[:3])
    assert first.startswith("s=4;")
    assert int(ask(proxy).headers["x-winnow-candidates"].partition(";")[0][2:]) > 4


def held_after(*numbers: int) -> Any:
    """Answers well, except that calls with these numbers hang."""

    def script(received: Received) -> Reply:
        return Reply(texts=("bad", "good", "so", "so"), hold=received.number in numbers)

    return script


@pytest.mark.parametrize("strategy", ["best_of_n", "adaptive", "speculative"])
def test_candidates_are_scored_while_another_is_still_written(start_proxy: StartProxy, strategy: str) -> None:
    proxy = start_proxy(upstream={"n_mode": "parallel"}, route={"prune_lag_s": 60})
    proxy.upstream.script = held_after(3)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, proxy, extra_body={"winnow": {"strategy": strategy}})
        proxy.scorer.wait_for(3)
        assert not asked.done()
        proxy.upstream.release()
        raw = asked.result()
    assert text_of(raw, False) == "good"
    assert raw.headers["x-winnow-candidates"] == "s=4;f=0;i=0"
    assert sum(len(completions) for _, completions in proxy.scorer.scored) == 3, "two say the same"


def test_or_all_together_after_the_last(start_proxy: StartProxy) -> None:
    proxy = start_proxy(upstream={"n_mode": "parallel"}, route={"score_early": False})
    proxy.upstream.script = lambda received: Reply(texts=("bad", "good", "so", "so so"))
    assert text_of(ask(proxy), False) == "good"
    assert [len(completions) for _, completions in proxy.scorer.scored] == [4]


@pytest.mark.parametrize("stream", [False, True])
class TestQuorum:
    def test_enough_candidates_end_the_waiting_and_cancel_the_rest(self, proxy: RunningProxy, stream: bool) -> None:
        proxy.upstream.script = held_after(3)
        raw = ask(proxy, stream=stream, extra_body={"winnow": {"quorum": 3}})
        assert text_of(raw, stream) == "good"
        assert raw.headers["x-winnow-candidates"] == "s=3;f=0;i=0;p=1"
        proxy.upstream.wait_for(lambda upstream: upstream.cancelled == 1)
        assert proxy.metric("winnow_candidates_total", route="default", outcome="cancelled") == 1

    def test_invalid_answers_do_not_count(self, proxy: RunningProxy, stream: bool) -> None:
        proxy.upstream.script = lambda received: Reply(texts=("", "", "good", "so"))
        raw = ask(proxy, stream=stream, extra_body={"winnow": {"quorum": 2}})
        assert text_of(raw, stream) == "good"

    def test_it_is_never_less_than_n(self, proxy: RunningProxy, stream: bool) -> None:
        proxy.upstream.script = held_after(3)
        raw = ask(proxy, stream=stream, n=3, extra_body={"winnow": {"quorum": 1}})
        assert raw.headers["x-winnow-candidates"] == "s=3;f=0;i=0;p=1"

    def test_a_failing_candidate_is_made_up_for_by_the_others(self, start_proxy: StartProxy, stream: bool) -> None:
        proxy = start_proxy(route={"quorum": 2})
        proxy.upstream.script = lambda received: (
            error_reply(500) if received.number == 0 else Reply(texts=("good",), hold=received.number == 3)
        )
        raw = ask(proxy, stream=stream)
        assert text_of(raw, stream) == "good"

    def test_without_one_a_hung_candidate_is_given_up_as_a_straggler(
        self, start_proxy: StartProxy, stream: bool
    ) -> None:
        proxy = start_proxy(route={"straggler_min_s": 0.05}, upstream={"n_mode": "parallel"})
        proxy.upstream.script = held_after(3)
        raw = ask(proxy, stream=stream)
        assert text_of(raw, stream) == "good"
        proxy.upstream.wait_for(lambda upstream: upstream.cancelled == 1)

    def test_a_quorum_that_cannot_come_is_not_waited_for(self, start_proxy: StartProxy, stream: bool) -> None:
        proxy = start_proxy(route={"straggler_min_s": 0.05, "quorum": 2})
        proxy.upstream.script = held_after(0, 2, 3)
        raw = ask(proxy, stream=stream)
        assert text_of(raw, stream) == "good"
        assert raw.headers["x-winnow-candidates"] == "s=1;f=0;i=0;p=3"


def test_a_hung_call_delays_a_route_that_is_known_to_be_quick_by_a_second(start_proxy: StartProxy) -> None:
    """With settings as they are: its cold patience of 10 s would outlast this client's own."""
    proxy = start_proxy(upstream={"n_mode": "parallel"})
    for _ in range(8):
        ask(proxy)
    proxy.upstream.script = held_after(33)
    raw = ask(proxy, extra_headers={"x-stainless-read-timeout": "600"}, timeout=9)
    assert raw.headers["x-winnow-candidates"] == "s=3;f=0;i=0;p=1"


def test_the_clients_time_out_bounds_even_a_deadline_that_it_asked_for(proxy: RunningProxy) -> None:
    proxy.upstream.script = held_after(0, 1, 2)
    raw = ask(proxy, seed=1, timeout=1.5, extra_body={"winnow": {"deadline_s": 60}})
    assert raw.headers["x-winnow-candidates"] == "s=1;f=3;i=0"


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -math.inf])
class TestRewardsThatAreNoNumbers:
    def test_the_first_valid_answer_wins_unscored(self, proxy: RunningProxy, nonsense: float) -> None:
        proxy.upstream.script = lambda received: Reply(texts=("so", "odd", "good", "so"))
        proxy.scorer.rewards["odd"] = nonsense
        raw = ask(proxy, seed=1)
        assert raw.headers["x-winnow-scored"] == "false"
        assert "x-winnow-reward" not in raw.headers
        assert proxy.metric("winnow_reward_failures_total", route="default") == 1

    def test_or_the_answer_is_a_503(self, start_proxy: StartProxy, nonsense: float) -> None:
        proxy = start_proxy(route={"on_reward_failure": "error"})
        proxy.scorer.rewards["an answer"] = nonsense
        with pytest.raises(openai.InternalServerError) as caught:
            ask(proxy)
        assert caught.value.code == "reward_model_unavailable"
