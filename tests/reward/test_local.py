from __future__ import annotations

import asyncio
import shutil
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from blockbuster import blockbuster_ctx
from prometheus_client import CollectorRegistry

import reward.model
from feedback.records import Message, Messages
from reward.batching import BatchingOptions
from reward.devices import DeviceError
from reward.errors import InputError, ModelLoadError, QueueFullError, ScoringError
from reward.local import LocalScorer
from reward.manifest import Head, Manifest
from reward.metrics import ScoreMetrics
from reward.model import load_reward_model
from reward.network import ClassifierRewardModel, PooledRewardModel
from reward.normalisation import Normalisation
from reward.rendering import Rendered
from reward.scorer import Score, Scorer
from reward.shared_prefix import SharingOptions
from reward.shared_prefix_model import SharedPrefixModel
from tests.fakes.gated import GatedModel
from tests.reward.conftest import TinyReward, started

SCALE = Normalisation(0.5, 0.25, tuple(q / 10 - 5 for q in range(101)))


def asked(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def answered(*texts: str) -> list[Messages]:
    return [[{"role": "assistant", "content": text}] for text in texts]


QUESTION = asked("What is the capital of France?")
ANSWERS = answered("Paris.", "I do not know, my friend.", "Paris is the capital of France. " * 20)


@pytest.fixture
def normalised(tiny_reward: TinyReward, tmp_path: Path) -> Path:
    """A model with a scale: mean 0.5, deviation 0.25, references evenly from -5 to 5."""
    folder = Path(shutil.copytree(tiny_reward("llama"), tmp_path / "normalised"))
    Manifest("tiny", "none", Head(), "chat", 64, normalisation=SCALE).save(folder)
    return folder


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> list[GatedModel]:
    """Encoders load with a gate before their network, which lands in this list."""
    gates: list[GatedModel] = []

    def load_gated(*args: Any, **options: Any) -> Any:
        model = load_reward_model(*args, **options)
        assert isinstance(model.network, ClassifierRewardModel)
        gates.append(GatedModel(model.network.classifier))
        model.network = ClassifierRewardModel(gates[-1])  # type: ignore[arg-type]  # called like the module it wraps
        return model

    monkeypatch.setattr(reward.model, "load_reward_model", load_gated)
    return gates


async def test_rewards_are_normalised_raw_rewards_in_order(normalised: Path) -> None:
    model = load_reward_model(str(normalised), device="cpu")
    items = [model.renderer.render(QUESTION, answer) for answer in ANSWERS]
    raw = [model.raw_rewards([item])[0] for item in items]
    async with started(normalised) as scorer:
        scores = await scorer.score(QUESTION, ANSWERS)
        assert scorer.reward_at_percentile(20) == pytest.approx(-3.0)
    assert [score.raw_reward for score in scores] == pytest.approx(raw, abs=1e-5)
    for score, item in zip(scores, items, strict=True):
        assert score.reward == pytest.approx((score.raw_reward - 0.5) / 0.25)
        assert score.percentile == pytest.approx(min(max((score.reward + 5) * 10, 0.0), 100.0))
        assert (score.prompt_tokens, score.completion_tokens) == (item.prompt_tokens, item.completion_tokens)
    assert [score.truncated for score in scores] == [False, False, True]


async def test_without_a_manifest_rewards_are_raw(tiny_reward: TinyReward) -> None:
    async with started(tiny_reward("qwen2")) as scorer:
        for score in await scorer.score(QUESTION, ANSWERS):
            assert score.reward == score.raw_reward
            assert score.percentile is None
        assert scorer.reward_at_percentile(20) is None
        assert await scorer.score(QUESTION, []) == []


async def test_callers_at_once_get_what_each_would_get_alone(tiny_reward: TinyReward) -> None:
    prompts = [asked(f"question {number} " * (number % 4 + 1)) for number in range(12)]
    async with started(tiny_reward("llama"), batching=BatchingOptions(max_batch_tokens=300)) as scorer:
        alone = [await scorer.score(prompt, ANSWERS) for prompt in prompts]
        together = await asyncio.gather(*(scorer.score(prompt, ANSWERS) for prompt in prompts))
    for left, right in zip(alone, together, strict=True):
        assert [s.reward for s in left] == pytest.approx([s.reward for s in right], abs=1e-5)
        assert [s.completion_tokens for s in left] == [s.completion_tokens for s in right]


async def test_the_name_is_the_callers_then_the_models(normalised: Path) -> None:
    unnamed: Scorer = LocalScorer(str(normalised), device="cpu")
    assert (unnamed.name, unnamed.ready) == (str(normalised), False)
    await unnamed.start()
    assert (unnamed.name, unnamed.ready) == ("tiny", True)
    await unnamed.aclose()
    assert not unnamed.ready
    async with started(normalised, name="mine") as named:
        assert named.name == "mine"


async def test_before_the_start_and_after_the_end_nothing_is_scored(normalised: Path) -> None:
    scorer = LocalScorer(str(normalised), device="cpu")
    with pytest.raises(ScoringError, match="is not loaded"):
        await scorer.score(QUESTION, ANSWERS)
    with pytest.raises(ScoringError, match="is not loaded"):
        scorer.reward_at_percentile(50)
    await scorer.start()
    assert len(await scorer.score(QUESTION, ANSWERS)) == 3
    await scorer.aclose()
    with pytest.raises(ScoringError):
        await scorer.score(QUESTION, ANSWERS)


async def test_a_model_that_does_not_load_says_so(tmp_path: Path) -> None:
    scorer = LocalScorer(str(tmp_path), device="cpu")
    with pytest.raises(ModelLoadError):
        await scorer.start()
    assert not scorer.ready
    await scorer.aclose()


async def test_messages_that_are_missing_are_the_callers_error(normalised: Path) -> None:
    async with started(normalised) as scorer:
        with pytest.raises(InputError, match="the prompt has no messages"):
            await scorer.score([], ANSWERS)
        with pytest.raises(InputError, match="a completion has no messages"):
            await scorer.score(QUESTION, [*ANSWERS, []])
        with pytest.raises(InputError, match="surrogate"):
            await scorer.score(QUESTION, answered("\ud800"))
        assert len(await scorer.score(QUESTION, ANSWERS)) == 3


async def enter(gate: GatedModel) -> None:
    await asyncio.to_thread(gate.wait_entered)


async def when(claim: Callable[[], bool]) -> None:
    """Turns of the loop until a claim holds that other tasks bring about."""
    async with asyncio.timeout(20):
        while not claim():
            await asyncio.to_thread(lambda: None)


async def test_a_full_queue_refuses_and_a_cancelled_caller_frees_it(
    tiny_reward: TinyReward, gate: list[GatedModel]
) -> None:
    metrics = ScoreMetrics(registry := CollectorRegistry())

    def depth() -> float | None:
        return registry.get_sample_value("winnow_score_queue_depth")

    async with started(
        tiny_reward("bert"), batching=BatchingOptions(max_queue=2, max_padding=1), metrics=metrics
    ) as scorer:
        running = asyncio.create_task(scorer.score(QUESTION, ANSWERS[:1]))
        await enter(gate[0])
        leaving = asyncio.create_task(scorer.score(QUESTION, ANSWERS[:2]))
        await when(lambda: depth() == 2)
        with pytest.raises(QueueFullError):
            await scorer.score(QUESTION, ANSWERS[:1])
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert depth() == 0
        staying = asyncio.create_task(scorer.score(QUESTION, ANSWERS[:2]))
        await when(lambda: depth() == 2)
        gate[0].open()
        assert [len(await task) for task in (running, staying)] == [1, 2]
    assert gate[0].batch_sizes == [1, 2]


async def test_closing_while_scoring_answers_everyone(tiny_reward: TinyReward, gate: list[GatedModel]) -> None:
    async with started(tiny_reward("bert"), batching=BatchingOptions(max_batch_size=1)) as scorer:
        callers = [asyncio.create_task(scorer.score(QUESTION, ANSWERS)) for _ in range(2)]
        await enter(gate[0])
        await scorer.aclose()
        for outcome in await asyncio.gather(*callers, return_exceptions=True):
            assert isinstance(outcome, ScoringError)
        gate[0].open()


async def test_a_failing_forward_is_halved_and_the_scorer_lives_on(
    tiny_reward: TinyReward, gate: list[GatedModel], caplog: pytest.LogCaptureFixture
) -> None:
    async with started(tiny_reward("bert"), batching=BatchingOptions(max_padding=1)) as scorer:
        # Both on the whole batch of three, then on its first half, which is one completion.
        gate[0].errors = [RuntimeError("out of memory"), RuntimeError("out of memory")]
        gate[0].open()
        with pytest.raises(ScoringError, match="out of memory"):
            await scorer.score(QUESTION, ANSWERS)
        assert gate[0].batch_sizes[:3] == [3, 1, 2]
        assert len(await scorer.score(QUESTION, ANSWERS)) == 3
    assert "scoring one completion failed" in caplog.text


async def test_metrics_move(tiny_reward: TinyReward) -> None:
    registry = CollectorRegistry()
    async with started(
        tiny_reward("llama"), batching=BatchingOptions(max_padding=1), metrics=ScoreMetrics(registry)
    ) as scorer:
        await scorer.score(QUESTION, ANSWERS)
        await scorer.score(QUESTION, ANSWERS[:1])
    assert registry.get_sample_value("winnow_score_batch_size_count") == 2
    assert registry.get_sample_value("winnow_score_batch_size_sum") == 4
    assert registry.get_sample_value("winnow_score_duration_seconds_count") == 2
    assert registry.get_sample_value("winnow_score_queue_depth") == 0


async def test_the_event_loop_is_never_blocked(normalised: Path) -> None:
    with blockbuster_ctx():
        async with started(normalised) as scorer:
            await asyncio.gather(*(scorer.score(QUESTION, ANSWERS) for _ in range(4)))


async def test_the_loop_turns_while_the_model_computes(tiny_reward: TinyReward, gate: list[GatedModel]) -> None:
    async with started(tiny_reward("bert")) as scorer:
        scoring: asyncio.Task[list[Score]] = asyncio.create_task(scorer.score(QUESTION, ANSWERS))
        await enter(gate[0])
        # Were the forward on this thread, nobody could let it go on.
        assert threading.current_thread() is threading.main_thread()
        assert not scoring.done()
        gate[0].open()
        assert len(await scoring) == 3


async def test_where_threads_take_turns_scoring_waits_for_its_own(normalised: Path) -> None:
    turns = threading.Lock()
    async with started(normalised, turns=turns) as scorer:
        with turns:
            waiting = asyncio.create_task(scorer.score(QUESTION, ANSWERS))
            done, _ = await asyncio.wait((waiting,), timeout=0.2)
            assert not done
        assert len(await waiting) == len(ANSWERS)


LONG_QUESTION = asked("What is the capital of France, and who says so? Please answer as well as you can. " * 3)
LONG_ANSWERS = answered(*("Paris is the capital. " * count for count in (1, 3, 2, 9)))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every pass of decoders that load while this is at work."""
    tokens: list[int] = []

    def load_counted(*args: Any, **options: Any) -> Any:
        model = load_reward_model(*args, **options)
        assert isinstance(model.network, PooledRewardModel)
        model.network.backbone.register_forward_pre_hook(  # type: ignore[operator]
            lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        return model

    monkeypatch.setattr(reward.model, "load_reward_model", load_counted)
    return tokens


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
async def test_a_prompt_is_encoded_once_for_all_completions_and_kept(
    family: str, tiny_reward: TinyReward, counted: list[int]
) -> None:
    padded = SharingOptions("off")
    async with started(tiny_reward(family), sharing=padded, batching=BatchingOptions(max_padding=1)) as scorer:
        expected = [score.raw_reward for score in await scorer.score(LONG_QUESTION, LONG_ANSWERS)]
        sizes = [
            score.prompt_tokens + score.completion_tokens for score in await scorer.score(LONG_QUESTION, LONG_ANSWERS)
        ]
    assert counted == [4 * max(sizes)] * 2
    counted.clear()
    async with started(tiny_reward(family)) as scorer:
        for _ in range(2):
            scores = await scorer.score(LONG_QUESTION, LONG_ANSWERS)
            assert [score.raw_reward for score in scores] == pytest.approx(expected, abs=1e-4)
    # The prompt ends in the heading of the answer; the answers here begin alike, too.
    once, again = counted
    assert again < once < sum(sizes)
    assert once - again >= scores[0].prompt_tokens


async def test_candidates_that_come_one_by_one_find_their_prompt_encoded(
    tiny_reward: TinyReward, counted: list[int]
) -> None:
    async with started(tiny_reward("llama"), sharing=SharingOptions(cache_tokens=0)) as scorer:
        expected = [(await scorer.score(LONG_QUESTION, [answer]))[0] for answer in LONG_ANSWERS]
    assert counted == [score.prompt_tokens + score.completion_tokens for score in expected]
    counted.clear()
    async with started(tiny_reward("llama")) as scorer:
        scores = [(await scorer.score(LONG_QUESTION, [answer]))[0] for answer in LONG_ANSWERS]
    first, *others = scores
    assert counted == [first.prompt_tokens + first.completion_tokens, *(one.completion_tokens for one in others)]
    for score, plain in zip(scores, expected, strict=True):
        assert score.raw_reward == pytest.approx(plain.raw_reward, abs=1e-4)


async def test_a_failing_pass_that_shares_is_halved_and_harms_nobody(
    tiny_reward: TinyReward, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(tiny_reward("llama")) as scorer:
        expected = [score.raw_reward for score in await scorer.score(LONG_QUESTION, LONG_ANSWERS)]
    run = SharedPrefixModel.raw_rewards
    sizes: list[int] = []
    failed: list[weakref.ref[torch.Tensor]] = []

    def small_memory(self: SharedPrefixModel, items: Sequence[Rendered], **how: Any) -> Any:
        sizes.append(len(items))
        assert all(states() is None for states in failed), "a failed pass still holds its memory"
        if len(items) > 2:
            states = torch.zeros(len(items))
            failed.append(weakref.ref(states))
            raise torch.OutOfMemoryError
        return run(self, items, **how)

    async with started(tiny_reward("llama")) as scorer:
        monkeypatch.setattr(SharedPrefixModel, "raw_rewards", small_memory)
        scores = await scorer.score(LONG_QUESTION, LONG_ANSWERS)
    assert sizes == [4, 2, 2]
    assert [score.raw_reward for score in scores] == pytest.approx(expected, abs=1e-4)
    assert not caplog.records


async def test_two_hundred_callers_some_of_whom_leave_get_their_own_rewards(tiny_reward: TinyReward) -> None:
    questions = [
        asked(f"What is the capital of country {number}? Please answer as well as you can.") for number in range(9)
    ]
    async with started(tiny_reward("llama"), batching=BatchingOptions(max_queue=2000)) as scorer:
        expected = [[s.raw_reward for s in await scorer.score(question, LONG_ANSWERS)] for question in questions]
        callers = [asyncio.create_task(scorer.score(questions[i % 9], LONG_ANSWERS)) for i in range(200)]
        await asyncio.sleep(0)
        for caller in callers[::7]:
            caller.cancel()
        outcomes = await asyncio.gather(*callers, return_exceptions=True)
    for index, outcome in enumerate(outcomes):
        if index % 7 == 0:
            assert isinstance(outcome, asyncio.CancelledError)
        else:
            assert isinstance(outcome, list)
            assert [score.raw_reward for score in outcome] == pytest.approx(expected[index % 9], abs=1e-4)


async def test_copies_on_several_devices_give_the_same_rewards_and_all_work(
    tiny_reward: TinyReward, gate: list[GatedModel]
) -> None:
    async with started(tiny_reward("bert")) as scorer:
        gate[0].open()
        expected = [score.raw_reward for score in await scorer.score(QUESTION, ANSWERS)]
    async with started(
        tiny_reward("bert"), devices=("cpu", "cpu"), batching=BatchingOptions(max_batch_size=2)
    ) as scorer:
        scoring = asyncio.create_task(scorer.score(QUESTION, ANSWERS))
        for one in gate[1:]:
            await enter(one)
            assert not scoring.done()
        for one in gate[1:]:
            one.open()
        assert [score.raw_reward for score in await scoring] == pytest.approx(expected, abs=1e-5)


async def test_a_copy_that_fails_does_not_take_the_others_down(
    tiny_reward: TinyReward, gate: list[GatedModel], caplog: pytest.LogCaptureFixture
) -> None:
    async with started(tiny_reward("bert"), devices=("cpu", "cpu")) as scorer:
        for one in gate:
            one.open()
        gate[0].errors = [RuntimeError("device lost")] * 100
        for _ in range(8):
            assert len(await scorer.score(QUESTION, ANSWERS)) == 3
        assert scorer.ready
        assert 0 < len(gate[0].batch_sizes) < 20
    assert "gets no more work" in caplog.text


async def test_of_several_devices_one_that_is_not_there_is_told(normalised: Path) -> None:
    scorer = LocalScorer(str(normalised), devices=("cpu", "cuda:99"))
    with pytest.raises(DeviceError, match="cuda:99"):
        await scorer.start()
    assert not scorer.ready
    await scorer.aclose()
