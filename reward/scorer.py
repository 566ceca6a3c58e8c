"""The seam between whoever needs rewards and whatever computes them.

`local.LocalScorer` computes in this process. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from feedback.records import Messages


@dataclass(frozen=True, slots=True)
class RawScore:
    """What a reward model's heads gave one completion."""

    reward: float
    """One number, whatever heads there are."""
    by_head: tuple[float, ...] = ()
    """Of each head by itself, where there are several."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a reward model says of one completion."""

    reward: float
    """Normalised: mean 0, deviation 1 on the model's reference completions. Raw where it has none."""
    raw_reward: float
    """As the head gave it. Comparable only within one reward model."""
    percentile: float | None
    """Share of reference completions with a lower reward, 0 to 100; None without references."""
    truncated: bool
    """Part of the prompt (or of an over-long completion) was cut to fit the model."""
    prompt_tokens: int
    completion_tokens: int
    std: float | None = None
    """How far the heads of an ensemble disagree: the deviation of their rewards, on the scale of `reward`. None for
    other models."""
    objectives: Mapping[str, float] | None = None
    """Of a model with several objectives: the reward for each, normalised on its own references. None for others."""

    def by_heads(self) -> dict[str, Any]:
        """`std` and `objectives` where there are such, as the JSON of answers has them."""
        found = {"std": self.std, "objectives": None if self.objectives is None else dict(self.objectives)}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True)
class TemplatedText:
    """What some template, perhaps another than ours, made of a conversation: scored as it stands."""

    text: str
    """Special tokens included."""
    prompt: str | None = None
    """The part that is the prompt, where the sender says so; else the last assistant turn is the completion."""


class Scorer(Protocol):
    """Scores completions of a prompt. Safe to call from many tasks at once."""

    @property
    def name(self) -> str:
        """What `reward_model` in requests and answers refers to."""

    @property
    def ready(self) -> bool:
        """Loaded, checked and able to take work."""

    async def start(self) -> None:
        """Loads the model. Raises `ModelLoadError`."""

    async def score(self, prompt: Messages, completions: Sequence[Messages]) -> list[Score]:
        """One score a completion, in order. Each completion is a list of messages, usually one.

        Cancelling the call drops what has not been computed and harms no other caller.
        Raises `InputError`, `QueueFullError`, `ScoringError`.
        """

    async def score_texts(self, texts: Sequence[TemplatedText]) -> list[Score]:
        """As `score`, for texts that were templated elsewhere. Raises `InputError` where that is not supported."""

    def reward_at_percentile(self, percentile: float) -> float | None:
        """The reward that `percentile` % of the reference completions fall under; None without references."""

    async def aclose(self) -> None:
        """Answers everyone who waits (with `ScoringError`) and frees the model."""


@runtime_checkable
class Expects(Protocol):
    """A scorer that can do a part of its work before there are completions."""

    def expecting(self, prompt: Messages) -> AbstractAsyncContextManager[None]:
        """Until the block ends, completions of this prompt may come. Delays no scoring, and what fails is not told.

        Raises `ScoringError` where nothing can be scored at all.
        """
