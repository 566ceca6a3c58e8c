"""OpenAI's fine-tuning API, which Azure (its v1 surface) and others speak too, by the `openai` client's own names."""

from __future__ import annotations

from collections.abc import Container, Mapping
from datetime import UTC, datetime
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from training.hosted.options import HostedOptions
from training.hosted.providers import Checkpoint, Event, Job, JobStage, JobStatus, ProviderError
from training.hosted.transport import MOST_LISTED, Calls

_STAGES: Mapping[str, JobStage] = {
    "validating_files": "validating",
    "queued": "queued",
    "pending": "queued",
    "running": "running",
    "paused": "running",
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
}
RUN_KEY = "winnow_run"
"""The job's metadata member that names its run."""


class OpenAIShape:
    """`/files` and `/fine_tuning/jobs`."""

    def __init__(self, calls: Calls, options: HostedOptions) -> None:
        self._calls = calls
        self._provider = options.provider
        self.serving_url = str(calls.client.base_url).rstrip("/")
        self.serving_note = (
            "Azure serves a tuned model after you deploy it; the model's name there is the deployment's."
            if options.provider == "azure"
            else None
        )

    def upload(self, path: Path, name: str) -> str:
        with self._calls.telling("POST /files"), path.open("rb") as opened:
            made = self._calls.once.files.create(file=(name, opened, "application/jsonl"), purpose="fine-tune")
        return str(_whole(made, "id").id)

    def find_file(self, name: str, size: int) -> str | None:
        with self._calls.telling("GET /files"):
            listed = islice(self._calls.client.files.list(purpose="fine-tune"), MOST_LISTED)
            fitting = (file for file in listed if file.filename == name and file.bytes == size)
            return next((file.id for file in fitting if file.status != "error"), None)

    def file_ready(self, file: str) -> bool:
        with self._calls.telling(f"GET /files/{file}"):
            found = _whole(self._calls.client.files.retrieve(file), "id")
        if found.status == "error":
            raise ProviderError(f"the file {file} was refused: {found.status_details or 'without a reason'}")
        # OpenAI checks a file as a part of the job; Azure refuses a job whose file it has not imported yet.
        return self._provider != "azure" or found.status == "processed"

    def create(self, job: Job) -> str:
        with self._calls.telling("POST /fine_tuning/jobs"):
            made = self._calls.once.fine_tuning.jobs.create(**self._request(job))
        return str(_whole(made, "id").id)

    def _request(self, job: Job) -> dict[str, Any]:
        options = job.options
        request: dict[str, Any] = {"model": options.model, "training_file": job.training_file}
        for name, value in (
            ("validation_file", job.validation_file),
            ("suffix", options.suffix),
            ("seed", options.seed),
        ):
            if value is not None:
                request[name] = value
        if self._provider == "nebius":
            return request | {"hyperparameters": _set(_PLAIN_NAMES, options) | _lora(options)}
        names = _METHOD_NAMES | ({"beta": "beta"} if options.method == "dpo" else {})
        kind = "dpo" if options.method == "dpo" else "supervised"
        method: dict[str, Any] = {"type": kind, kind: {"hyperparameters": _set(names, options)}}
        return request | {"method": method, "metadata": {RUN_KEY: job.run}}

    def find_job(self, job: Job) -> str | None:
        """By its training file, which is uploaded for this job alone."""
        with self._calls.telling("GET /fine_tuning/jobs"):
            listed = islice(self._calls.client.fine_tuning.jobs.list(), MOST_LISTED)
            return next((one.id for one in listed if one.training_file == job.training_file), None)

    def status(self, job: str) -> JobStatus:
        with self._calls.telling(f"GET /fine_tuning/jobs/{job}"):
            found = _whole(self._calls.client.fine_tuning.jobs.retrieve(job), "id", "status")
        said = str(found.status)
        error = found.error.message if found.error and found.error.message else None
        return JobStatus(
            id=found.id,
            stage=_STAGES.get(said, "running"),
            said=said,
            model=found.fine_tuned_model,
            error=error,
            trained_tokens=found.trained_tokens,
            finishes_at=found.estimated_finish,
        )

    def events(self, job: str, known: Container[str] = ()) -> list[Event]:
        with self._calls.telling(f"GET /fine_tuning/jobs/{job}/events"):
            # Newest first: behind a known one stand only known ones.
            listed = islice(self._calls.client.fine_tuning.jobs.list_events(job, limit=100), MOST_LISTED)
            found = list(takewhile(lambda event: event.id not in known, listed))
        # Of the same second, the later in the list happened earlier.
        found.reverse()
        return [
            Event(one.id, utc(one.created_at), one.level, one.message, numbers(one.data))
            for one in sorted(found, key=lambda event: event.created_at)
        ]

    def checkpoints(self, job: str) -> list[Checkpoint]:
        if self._provider == "nebius":
            return []
        with self._calls.telling(f"GET /fine_tuning/jobs/{job}/checkpoints"):
            found = list(islice(self._calls.client.fine_tuning.jobs.checkpoints.list(job), MOST_LISTED))
        kept = [
            Checkpoint(one.step_number, one.fine_tuned_model_checkpoint, numbers(one.metrics.model_dump()))
            for one in found
        ]
        return sorted(kept, key=lambda checkpoint: checkpoint.step)

    def cancel(self, job: str) -> None:
        with self._calls.telling(f"POST /fine_tuning/jobs/{job}/cancel"):
            self._calls.client.fine_tuning.jobs.cancel(job)


_METHOD_NAMES = {
    "epochs": "n_epochs",
    "batch_size": "batch_size",
    "learning_rate_multiplier": "learning_rate_multiplier",
}
_PLAIN_NAMES = {"epochs": "n_epochs", "batch_size": "batch_size", "learning_rate": "learning_rate"}


def _whole(answer: Any, *members: str) -> Any:
    """The library takes any answer for what was asked for, even a web page. Raises `ProviderError`."""
    for member in members:
        value = getattr(answer, member, None)
        if not isinstance(value, str) or not value:
            raise ProviderError(f"the answer has no {member}: is the base URL right?")
    return answer


def _set(names: Mapping[str, str], options: HostedOptions) -> dict[str, Any]:
    """The settings that are given, by the service's names."""
    return {theirs: getattr(options, ours) for ours, theirs in names.items() if getattr(options, ours) is not None}


def _lora(options: HostedOptions) -> dict[str, Any]:
    return {} if options.lora_rank is None else {"lora": True, "lora_r": options.lora_rank}


def utc(seconds: float) -> str:
    """A moment as people read it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def numbers(data: object) -> dict[str, float]:
    """The members of an event's data that are numbers."""
    if not isinstance(data, Mapping):
        return {}
    return {
        str(name): float(value)
        for name, value in data.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
