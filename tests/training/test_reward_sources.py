"""Where PPO's scores come from: the same as serving gives, and never taken on trust."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from feedback.records import Messages
from reward.errors import ModelLoadError, ScoringError
from reward.model import load_reward_model
from reward.scorer import Score, Scorer
from tests.fakes.models import build_tiny_reward_model
from tests.training import ppo_tasks
from training.options import OptionsError
from training.reward_sources import RewardSource, RewardSourceOptions
from training.rule_rewards import capitalised_words

PROMPTS: list[Messages] = [[{"role": "user", "content": f"question {k}"}] for k in range(5)]
TEXTS = ["one two", "", "three <|im_end|> four", "Ünï", "five " * 30]
FUNCTION = f"{ppo_tasks.__name__}:letters"


def source(open_remote: Any = None, **named: Any) -> RewardSource:
    return RewardSource(RewardSourceOptions(**named), device="cpu", open_remote=open_remote)


def test_r3_a_reward_model_scores_text_as_when_it_serves(tmp_path: Path) -> None:
    folder = str(build_tiny_reward_model(tmp_path))
    with source(model=folder, calls_at_once=2) as reward:
        found = reward.score(PROMPTS, TEXTS)
    model = load_reward_model(folder, device="cpu")
    for prompt, text, score in zip(PROMPTS, TEXTS, found, strict=True):
        rendered = model.renderer.render(prompt, [{"role": "assistant", "content": text}])
        (raw,) = model.raw_rewards([rendered])
        assert score == pytest.approx(model.manifest.normalisation.reward(raw), abs=1e-5)


class Service:
    """A scorer elsewhere, which answers as it is told."""

    name, ready = "service", True

    def __init__(self, rewards: Sequence[float]) -> None:
        self.rewards = list(rewards)
        self.events: list[str] = []

    async def start(self) -> None:
        self.events.append("start")

    async def score(self, prompt: Messages, completions: Sequence[Messages]) -> list[Score]:
        reward = self.rewards[int(str(prompt[0]["content"]).split()[-1])]
        return [Score(reward, 0.0, None, False, 1, 1) for _ in completions]

    async def aclose(self) -> None:
        self.events.append("close")


def test_a_service_is_opened_asked_and_closed() -> None:
    service = Service([0.1, 0.2, 0.3, 0.4, 0.5])
    with source(lambda options: cast(Scorer, service), url="http://gpu:8001/v1") as reward:
        assert reward.score(PROMPTS, TEXTS) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert service.events == ["start", "close"]


def test_numbers_of_numpy_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo_tasks, "letters", lambda prompts, completions: np.array([0.5, 2.0], dtype=np.float32))
    with source(function=FUNCTION) as reward:
        assert reward.score(PROMPTS[:2], TEXTS[:2]) == [0.5, 2.0]


@pytest.mark.parametrize("answer", [[float("nan")], [1.0, float("inf")], [True], ["0.5"], [None]])
def test_p23_scores_that_are_no_finite_numbers_stop_the_run(answer: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo_tasks, "letters", lambda prompts, completions: answer)
    with source(function=FUNCTION) as reward, pytest.raises(ScoringError, match="was scored"):
        reward.score(PROMPTS[: len(answer)], TEXTS[: len(answer)])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_p23_too_few_or_too_many_scores_stop_the_run(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo_tasks, "letters", lambda prompts, completions: [1.0] * count)
    with source(function=FUNCTION) as reward, pytest.raises(ScoringError, match=f"2 completions .* {count} scores"):
        reward.score(PROMPTS[:2], TEXTS[:2])


def test_p23_a_service_that_fails_says_so() -> None:
    class Failing(Service):
        async def score(self, prompt: Messages, completions: Sequence[Messages]) -> list[Score]:
            raise ScoringError("the service answered 500")

    with (
        source(lambda options: cast(Scorer, Failing([])), url="http://gpu:8001/v1") as reward,
        pytest.raises(ScoringError, match="answered 500"),
    ):
        reward.score(PROMPTS, TEXTS)


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ({}, "not 0 of them"),
        ({"model": "default", "function": FUNCTION}, "not 2 of them"),
        ({"function": "letters"}, "must be written module:name"),
        ({"function": "no_such_module:f"}, "cannot be found"),
        ({"function": f"{ppo_tasks.__name__}:nothing"}, "cannot be found"),
        ({"function": f"{ppo_tasks.__name__}:__name__"}, "is no function"),
        ({"url": "http://gpu:8001"}, "nothing here opens connections"),
    ],
)
def test_what_is_no_source_is_refused(named: dict[str, str], problem: str) -> None:
    with pytest.raises(OptionsError, match=problem):
        source(**named)


def test_a_model_that_does_not_load_is_an_error_of_the_start(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError), source(model=str(tmp_path)):
        pass


def test_capitalised_words_by_hand() -> None:
    texts = ["One two Three four", "", "ALL OK", "none at all", "'Quoted 3rd"]
    assert capitalised_words([[]] * 5, texts) == [0.5, 0.0, 1.0, 0.0, 0.0]
