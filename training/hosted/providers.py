"""What a fine-tuning service is to us: rules for its files, and a few calls. Each service's own shapes live beside.

Errors here are `ProviderError`: the service said no, or could not be reached. `transport.py` maps a client library's
errors to them.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from training.hosted.options import HostedMethod, HostedOptions

JobStage = Literal["validating", "queued", "running", "succeeded", "failed", "cancelled"]
ENDED: frozenset[JobStage] = frozenset({"succeeded", "failed", "cancelled"})
Split = Literal["train", "validation"]


class ProviderError(Exception):
    """A fine-tuning service refused or could not be reached. The message names the call and never holds the key."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a service takes, as it documents it; checked before anything is uploaded."""

    methods: frozenset[HostedMethod]
    takes: frozenset[str]
    """Which of the settings that not everyone has: `suffix`, `seed`, `beta`, …"""
    min_rows: int
    """Fewest rows of training data."""
    max_file_bytes: int
    max_rows: int | None = None
    weights: bool = False
    """An assistant message may carry `weight: 0`: not learnt."""
    tools: bool = True
    alternating: bool = False
    """After a system message, user and assistant take turns."""
    several_outputs: bool = False
    """A DPO output may be several messages, of assistant and tool."""
    dpo_validation: bool = True
    max_suffix: int = 64
    """Longest suffix, in characters."""


@dataclass(frozen=True, slots=True)
class Job:
    """A fine-tuning job to be created."""

    run: str
    """Names this job and no other: derived from the settings and the data."""
    options: HostedOptions
    training_file: str
    validation_file: str | None = None


@dataclass(frozen=True, slots=True)
class JobStatus:
    """How a job stands."""

    id: str
    stage: JobStage
    said: str
    """The service's own word for the stage."""
    model: str | None = None
    """The tuned model's name, once there is one."""
    error: str | None = None
    trained_tokens: int | None = None
    finishes_at: float | None = None
    """Seconds since 1970, as the service expects it."""
    progress: float | None = None
    """Share of the work that is done, from 0 to 1, where the service says."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a job."""

    id: str
    at: str
    """When, in UTC: `2026-01-31 09:00:00`."""
    level: str
    message: str
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model from the midst of a job that can be used by itself."""

    step: int
    model: str
    metrics: Mapping[str, float]


class Provider(Protocol):
    """A fine-tuning service. Every method raises `ProviderError`.

    `upload` and `create` make one try and raise `transport.Unfinished` where another may help: only the caller knows
    whether to look first for what the failed one may have left behind.
    """

    @property
    def serving_url(self) -> str:
        """Base URL under which a tuned model answers."""

    @property
    def serving_note(self) -> str | None:
        """What else a tuned model needs before it answers."""

    def upload(self, path: Path, name: str) -> str:
        """Sends a file; its id there."""

    def find_file(self, name: str, size: int) -> str | None:
        """The id of a file that was sent under this name and has this many bytes."""

    def file_ready(self, file: str) -> bool:
        """Whether a job can use the file. Raises `ProviderError` for one that was refused."""

    def create(self, job: Job) -> str:
        """Creates a job; its id there."""

    def find_job(self, job: Job) -> str | None:
        """The id of the job that was created from this one."""

    def status(self, job: str) -> JobStatus:
        """How the job stands."""

    def events(self, job: str, known: Container[str] = ()) -> list[Event]:
        """What happened so far, oldest first, without the events whose ids are known."""

    def checkpoints(self, job: str) -> list[Checkpoint]:
        """Its checkpoints, if the service keeps any."""

    def cancel(self, job: str) -> None:
        """Asks the service to stop the job."""
