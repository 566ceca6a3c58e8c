"""The four promises of scoring, kept all at once under 200 callers, with a real model that is small.

Some callers send what the model answers with NaN, some leave, the device holds few tokens, the queue is short: whoever
gets rewards gets those that their completions have alone.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import reward.model
from feedback.records import Message, Messages
from reward.batching import BatchingOptions
from reward.errors import InputError, QueueFullError, ScoringError
from reward.local import LocalScorer
from reward.model import load_reward_model
from reward.network import PooledRewardModel
from tests.fakes.models import build_tiny_encoder_reward_model, build_tiny_reward_model

CALLERS = 200
TOLERANCE = 1e-4
POISON = "☠"
DEVICE_TOKENS = 600
"""What a pass may have before the device is out of memory. The longest completion alone has less."""
TEXT = "one two three four five six seven eight nine ten What is the capital of France"


@dataclass(frozen=True, slots=True)
class Call:
    """What one caller asks for."""

    prompt: list[Message]
    completions: list[Messages]

    @property
    def poisoned(self) -> bool:
        return POISON in str(self)


def calls() -> list[Call]:
    """Of all lengths; some share a prompt, some its beginning, as requests with one system prompt do."""
    choice = random.Random(0)

    def text(longest: int) -> str:
        return " ".join(choice.choices(TEXT.split(), k=choice.randint(1, longest)))

    system: Message = {"role": "system", "content": "You are a helpful assistant. " * 3}
    prompts = [[system, Message(role="user", content=text(30))] for _ in range(40)]
    made = []
    for number in range(CALLERS):
        prompt = list(choice.choice(prompts))
        answers = [text(60) for _ in range(choice.randint(1, 5))]
        if number % 11 == 3:
            answers[-1] += POISON
        elif number % 23 == 5:
            # What follows the poison in a prompt is spoilt; what stands before it may be remembered.
            prompt[1] = Message(role="user", content=f"{prompt[1]['content']} {POISON}")
        made.append(Call(prompt, [[Message(role="assistant", content=answer)] for answer in answers]))
    return made


@pytest.fixture(scope="module", params=["llama", "bert"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a token whose embedding is NaN: so is every reward of a text that holds it."""
    folder = tmp_path_factory.mktemp("poison") / request.param
    if request.param == "bert":
        build_tiny_encoder_reward_model(folder)
    else:
        build_tiny_reward_model(folder, family=request.param)
    poison = AutoTokenizer.from_pretrained(folder)(POISON, add_special_tokens=False)["input_ids"][-1]
    weights = load_file(folder / "model.safetensors")
    (name,) = (
        name for name in weights if name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))
    )
    weights[name][poison] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Models that load from here on are out of memory on passes of more than `DEVICE_TOKENS`, whose sizes land here."""
    refused: list[int] = []

    def check(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        tokens = kwargs["input_ids"].numel()
        if tokens > DEVICE_TOKENS:
            refused.append(tokens)
            raise torch.OutOfMemoryError(f"{tokens} tokens")

    def load(*args: Any, **options: Any) -> Any:
        loaded = load_reward_model(*args, **options)
        network = loaded.network
        body = network.backbone if isinstance(network, PooledRewardModel) else network.classifier
        body.register_forward_pre_hook(check, with_kwargs=True)
        return loaded

    monkeypatch.setattr(reward.model, "load_reward_model", load)
    return refused


@asynccontextmanager
async def started(folder: Path, max_queue: int) -> AsyncIterator[LocalScorer]:
    # Batches as a GPU would like them: far more than this device holds.
    batching = BatchingOptions(max_batch_tokens=4 * DEVICE_TOKENS, max_padding=1, max_queue=max_queue)
    scorer = LocalScorer(str(folder), device="cpu", batching=batching)
    try:
        await scorer.start()
        yield scorer
    finally:
        await scorer.aclose()


@pytest.fixture(scope="module")
def alone(model: Path) -> list[list[float]]:
    """Of each caller, the rewards of completions by themselves in plain passes; of poisoned ones none."""
    loaded = load_reward_model(str(model), device="cpu")

    def rewards(call: Call) -> list[float]:
        items = [loaded.renderer.render(call.prompt, completion) for completion in call.completions]
        return [reward for item in items for reward in loaded.raw_rewards([item])]

    return [[] if call.poisoned else rewards(call) for call in calls()]


def check(call: Call, outcome: object, expected: list[float]) -> None:
    if call.poisoned:
        assert isinstance(outcome, ScoringError), outcome
        return
    assert isinstance(outcome, list), outcome
    assert [score.raw_reward for score in outcome] == pytest.approx(expected, abs=TOLERANCE)


async def test_poison_leavers_and_a_full_device_change_nobody_elses_rewards(
    model: Path, alone: list[list[float]], small_device: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    asked = calls()
    async with started(model, max_queue=10 * CALLERS) as scorer:
        callers = [asyncio.create_task(scorer.score(call.prompt, call.completions)) for call in asked]
        broken = asyncio.create_task(scorer.score(asked[0].prompt, [[Message(role="assistant", content="\ud800")]]))
        await asyncio.sleep(0)
        for caller in callers[::7]:
            caller.cancel()
        outcomes = await asyncio.gather(*callers, return_exceptions=True)
        with pytest.raises(InputError):
            await broken
        # Nothing of it stays: the same callers once more, one after the other.
        for call, own in zip(asked[:20], alone[:20], strict=True):
            (again,) = await asyncio.gather(scorer.score(call.prompt, call.completions), return_exceptions=True)
            check(call, again, own)
    assert small_device, "no pass was too large for the device"
    for number, (call, outcome, own) in enumerate(zip(asked, outcomes, alone, strict=True)):
        if number % 7 == 0:
            assert isinstance(outcome, asyncio.CancelledError)
        else:
            check(call, outcome, own)
    assert "not finite" in caplog.text


async def test_callers_over_the_limit_are_refused_at_once_and_the_others_get_their_rewards(
    model: Path, alone: list[list[float]], small_device: list[int]
) -> None:
    asked = calls()
    async with started(model, max_queue=60) as scorer:
        tasks = [asyncio.create_task(scorer.score(call.prompt, call.completions)) for call in asked]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, QueueFullError)]
    assert 0 < len(refused) < CALLERS
    for call, outcome, own in zip(asked, outcomes, alone, strict=True):
        if not isinstance(outcome, QueueFullError):
            check(call, outcome, own)


async def test_closing_answers_all_who_wait(model: Path, alone: list[list[float]], small_device: list[int]) -> None:
    asked = calls()
    async with started(model, max_queue=10 * CALLERS) as scorer:
        tasks = [asyncio.create_task(scorer.score(call.prompt, call.completions)) for call in asked]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await scorer.aclose()
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), timeout=30)
    answered = [outcome for outcome in outcomes if isinstance(outcome, list)]
    assert len(answered) < CALLERS
    for call, outcome, own in zip(asked, outcomes, alone, strict=True):
        if not isinstance(outcome, ScoringError):
            check(call, outcome, own)
