"""Prompts encoded while their completions are still awaited; what was computed is read off the passes' tokens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import reward.model
import reward.shared_prefix_model
from feedback.records import Message, Messages
from reward.model import RewardModel, load_reward_model
from reward.shared_prefix import SharingOptions
from reward.shared_prefix_model import SharedPrefixModel
from tests.reward.conftest import TinyReward, started

WAIT_S = 20


def asked(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def answered(*texts: str) -> list[Messages]:
    return [[{"role": "assistant", "content": text}] for text in texts]


QUESTION = asked("What is the capital of France, and who says so? Please answer as well as you can. " * 4)
ANSWERS = answered("Paris.", "I do not know, my friend.", "Paris is the capital of France.")


class Passes:
    """Tokens of every pass of the models that load while this is at work; they wait while `held`."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def record(self, module: Any, args: Any, kwargs: Any) -> None:
        self.tokens.append(kwargs["input_ids"].numel())
        assert self.go_on.wait(WAIT_S)

    @contextmanager
    def held(self) -> Iterator[None]:
        self.go_on.clear()
        try:
            yield
        finally:
            self.go_on.set()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    passes = Passes()

    def load(*args: Any, **options: Any) -> RewardModel:
        model = load_reward_model(*args, **options)
        network: Any = model.network
        network.backbone.register_forward_pre_hook(passes.record, with_kwargs=True)
        return model

    monkeypatch.setattr(reward.model, "load_reward_model", load)
    return passes


async def until(claim: Callable[[], bool]) -> None:
    """Turns of the loop until a claim holds that other tasks and threads bring about."""
    async with asyncio.timeout(WAIT_S):
        while not claim():
            await asyncio.to_thread(lambda: None)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
async def test_completions_then_cost_what_is_their_own(family: str, tiny_reward: TinyReward, passes: Passes) -> None:
    async with started(tiny_reward(family), sharing=SharingOptions("off")) as scorer:
        expected = await scorer.score(QUESTION, ANSWERS)
    passes.tokens.clear()
    async with started(tiny_reward(family)) as scorer:
        prompt_tokens = expected[0].prompt_tokens
        async with scorer.expecting(QUESTION):
            await until(lambda: sum(passes.tokens) >= prompt_tokens)
            passes.tokens.clear()
            scores = [(await scorer.score(QUESTION, [answer]))[0] for answer in ANSWERS]
    # Of the prompt only its last token is left over, for the first of them.
    own = [score.completion_tokens for score in expected]
    assert passes.tokens == [own[0] + 1, *own[1:]]
    assert [s.raw_reward for s in scores] == pytest.approx([s.raw_reward for s in expected], abs=1e-4)


async def test_a_step_is_all_that_scoring_ever_waits_for(
    tiny_reward: TinyReward, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward.shared_prefix_model, "CPU_PREFILL_TOKENS", 40)
    other = asked("Who are you?")
    async with started(tiny_reward("llama")) as scorer, scorer.expecting(QUESTION):
        with passes.held():
            await until(lambda: len(passes.tokens) == 1)
            scoring = asyncio.create_task(scorer.score(other, ANSWERS[:1]))
            await until(lambda: scorer.queue_depth == 1)
        (score,) = await scoring
        assert passes.tokens[:2] == [40, score.prompt_tokens + score.completion_tokens]
        prompt_tokens = (await scorer.score(QUESTION, ANSWERS[:1]))[0].prompt_tokens
        assert prompt_tokens > 120
        # Steps, and scoring between them, add up to the prompt once and the completion.
        assert all(tokens <= 41 for tokens in passes.tokens[2:-1])


async def test_who_leaves_takes_the_rest_of_the_work_along(
    tiny_reward: TinyReward, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward.shared_prefix_model, "CPU_PREFILL_TOKENS", 40)
    async with started(tiny_reward("llama")) as scorer:
        with passes.held():
            async with scorer.expecting(QUESTION):
                await until(lambda: len(passes.tokens) == 1)
        await scorer.score(asked("Who are you?"), ANSWERS[:1])
        assert len(passes.tokens) == 2


async def test_what_would_not_pay_is_left_alone(tiny_reward: TinyReward, passes: Passes) -> None:
    long = asked("one two three " * 400)
    for folder, options in [
        (tiny_reward("llama"), {"sharing": SharingOptions("off")}),
        (tiny_reward("llama"), {"sharing": SharingOptions(cache_tokens=0)}),
        (tiny_reward("llama"), {"sharing": SharingOptions(cache_tokens=100)}),
    ]:
        async with started(folder, **options) as scorer:
            async with scorer.expecting(QUESTION), scorer.expecting(asked("Hi")), scorer.expecting(long):
                scored = await scorer.score(asked("Who are you?"), ANSWERS[:1])
                for _ in range(20):
                    await asyncio.to_thread(lambda: None)
            assert passes.tokens == [scored[0].prompt_tokens + scored[0].completion_tokens]
            passes.tokens.clear()


async def test_what_is_expected_never_pushes_out_what_was_expected_before(
    tiny_reward: TinyReward, passes: Passes
) -> None:
    async with started(tiny_reward("llama"), sharing=SharingOptions(cache_tokens=200)) as scorer:
        another = asked(f"You! {QUESTION[0]['content']}")
        async with scorer.expecting(QUESTION):
            await until(lambda: len(passes.tokens) == 1)
            async with scorer.expecting(another):
                for _ in range(20):
                    await asyncio.to_thread(lambda: None)
            assert len(passes.tokens) == 1
        async with scorer.expecting(another):
            await until(lambda: len(passes.tokens) == 2)


async def test_who_is_cancelled_twice_leaves_the_room_all_the_same(tiny_reward: TinyReward, passes: Passes) -> None:
    async def expects() -> None:
        async with scorer.expecting(QUESTION):
            await asyncio.Event().wait()

    async with started(tiny_reward("llama"), sharing=SharingOptions(cache_tokens=200)) as scorer:
        with passes.held():
            expecting = asyncio.create_task(expects())
            await until(lambda: len(passes.tokens) == 1)
            expecting.cancel()
            await asyncio.sleep(0)
            expecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await expecting
        async with scorer.expecting(asked(f"You! {QUESTION[0]['content']}")):
            await until(lambda: len(passes.tokens) == 2)


async def test_prompts_of_any_shape_and_failing_passes_are_nobodys_error(
    tiny_reward: TinyReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: SharedPrefixModel, ids: list[int]) -> int:
        failed.set()
        raise RuntimeError("scripted")

    failed = threading.Event()
    strange: Any = [{"role": "user", "content": [{"text": "x " * 200}, 7]}]
    async with started(tiny_reward("llama")) as scorer:
        monkeypatch.setattr(SharedPrefixModel, "prefill", failing)
        async with scorer.expecting(strange), scorer.expecting(QUESTION):
            await until(failed.is_set)
            assert len(await scorer.score(QUESTION, ANSWERS)) == 3


async def test_two_calls_for_one_prompt_in_one_pass_share_it(tiny_reward: TinyReward, passes: Passes) -> None:
    async with started(tiny_reward("llama")) as scorer:
        expected = await scorer.score(QUESTION, ANSWERS)
    passes.tokens.clear()
    async with started(tiny_reward("llama")) as scorer:
        with passes.held():
            blocking = asyncio.create_task(scorer.score(asked("Who are you?"), ANSWERS[:1]))
            await until(lambda: len(passes.tokens) == 1)
            calls = [asyncio.create_task(scorer.score(QUESTION, [answer])) for answer in ANSWERS]
            await until(lambda: scorer.queue_depth == 3)
        scores = [(await call)[0] for call in calls]
        await blocking
    assert passes.tokens[1:] == [scores[0].prompt_tokens + sum(score.completion_tokens for score in scores)]
    assert [s.raw_reward for s in scores] == pytest.approx([s.raw_reward for s in expected], abs=1e-4)
