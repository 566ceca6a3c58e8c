"""Where PPO's scores come from: a reward model in this process, a service, or a Python function.

All are asked for text, never for token ids: a reward model renders what it is given exactly as it does when it serves.
"""

from __future__ import annotations

import asyncio
import importlib
import math
from collections.abc import Callable, Sequence
from numbers import Real
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, cast

from pydantic import Field, SecretStr

from feedback.records import Messages
from reward.dialects import DialectName
from reward.errors import ScoringError
from reward.scorer import Scorer
from training.options import Options, OptionsError


class RewardSourceOptions(Options):
    """What scores completions. Exactly one of `model`, `url` and `function`."""

    model: str | None = None
    """A reward model in this process: folder, hub id, or `default` for the shipped one. Scores are normalised."""
    url: str | None = None
    """A service that scores, such as `winnow reward serve`: `http://gpu:8001/v1`."""
    protocol: DialectName = "winnow"
    """What the service speaks."""
    key: SecretStr | None = None
    """Sent to the service as a bearer token; `${NAME}` takes it from the environment."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Seconds for one request to the service."""
    function: str | None = None
    """`module:name` of a function of ours: (prompts as lists of messages, completions as texts) -> a number each."""
    calls_at_once: int = Field(default=32, ge=1)
    """Prompts that a service is asked about at once."""


if TYPE_CHECKING:
    from reward.model import RewardModel

OpenRemote = Callable[[RewardSourceOptions], Scorer]
"""Makes the scorer of a service; handed in, since the transport is no business of training."""


class RewardFunction(Protocol):
    """A reward of one's own."""

    def __call__(self, prompts: Sequence[Messages], completions: Sequence[str]) -> Sequence[float]:
        """A finite number for each completion, in order."""


def require_source(options: RewardSourceOptions, name: str = "reward") -> None:
    """Raises `OptionsError` for other than one source, or a function that is not there."""
    named = [one for one in ("model", "url", "function") if getattr(options, one) is not None]
    if len(named) != 1:
        raise OptionsError(f"{name}: name one of model, url and function, not {len(named)} of them")
    if options.function is not None:
        _imported(options.function, name)


class RewardSource:
    """Scores completions, checked: as many as asked for, and finite. A context manager."""

    def __init__(self, options: RewardSourceOptions, *, device: str, open_remote: OpenRemote | None = None) -> None:
        """Raises `OptionsError` for other than one source, or a function that is not there."""
        require_source(options)
        self._function: RewardFunction | None = None
        self._model_source: str | None = None
        self._model: RewardModel | None = None
        self._device = device
        self._scorer: Scorer | None = None
        self._calls_at_once = options.calls_at_once
        if options.function is not None:
            self._function = _imported(options.function)
        elif options.model is not None:
            self._model_source = options.model
        elif open_remote is None:
            raise OptionsError("reward.url: nothing here opens connections; start the run by `winnow train ppo`")
        else:
            self._scorer = open_remote(options)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        if self._model_source is not None:
            from reward.model import load_reward_model

            self._model = load_reward_model(self._model_source, device=self._device)
        if self._scorer is not None:
            try:
                self._runner.run(self._scorer.start())
            except BaseException:
                self._runner.close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._scorer is not None:
            self._runner.run(self._scorer.aclose())
        self._runner.close()

    def score(self, prompts: Sequence[Messages], completions: Sequence[str]) -> list[float]:
        """A score for each completion, in order. Raises `ScoringError` for too few, too many, or one not finite."""
        if self._function is not None:
            scores: list[object] = list(self._function(prompts, completions))
        elif self._model is not None:
            scores = [*_rewards(self._model, prompts, completions)]
        else:
            scores = [*self._runner.run(self._ask(prompts, completions))]
        if len(scores) != len(completions):
            raise ScoringError(f"{len(completions)} completions were to be scored, {len(scores)} scores came back")
        numbers: list[float] = []
        for number, score in enumerate(scores):
            if isinstance(score, bool) or not isinstance(score, Real) or not math.isfinite(score):
                raise ScoringError(f"completion {number} of {len(scores)} was scored {score!r}: no finite number")
            numbers.append(float(score))
        return numbers

    async def _ask(self, prompts: Sequence[Messages], completions: Sequence[str]) -> list[float]:
        scorer = cast(Scorer, self._scorer)
        places = asyncio.Semaphore(self._calls_at_once)

        async def ask(prompt: Messages, text: str) -> float:
            async with places:
                (score,) = await scorer.score(prompt, [[{"role": "assistant", "content": text}]])
            return score.reward

        try:
            async with asyncio.TaskGroup() as group:
                asked = [
                    group.create_task(ask(prompt, text)) for prompt, text in zip(prompts, completions, strict=True)
                ]
        except ExceptionGroup as failed:
            # The first is the cause; the others were cancelled or say the same.
            raise failed.exceptions[0] from failed
        return [task.result() for task in asked]


def _rewards(model: RewardModel, prompts: Sequence[Messages], completions: Sequence[str]) -> list[float]:
    """In batches that depend on the texts alone, so that a run which is resumed gets the very same rewards."""
    items = [
        model.renderer.render(prompt, [{"role": "assistant", "content": text}])
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    return [
        model.manifest.score(raw, item).reward for raw, item in zip(model.raw_scores_of_all(items), items, strict=True)
    ]


def _imported(name: str, option: str = "reward") -> RewardFunction:
    module, separator, function = name.partition(":")
    if not separator:
        raise OptionsError(f"{option}.function: {name!r} must be written module:name")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise OptionsError(f"{option}.function: {name!r} cannot be found: {error}") from error
    if not callable(found):
        raise OptionsError(f"{option}.function: {name!r} is no function")
    return cast(RewardFunction, found)
