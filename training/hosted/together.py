"""Together's fine-tuning API (docs.together.ai/reference): `/files/upload` and `/fine-tunes`."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from training.hosted.openai_shape import numbers
from training.hosted.providers import Checkpoint, Event, Job, JobStage, JobStatus, ProviderError
from training.hosted.transport import Calls

_STAGES: Mapping[str, JobStage] = {
    "pending": "validating",
    "queued": "queued",
    "running": "running",
    "compressing": "running",
    "uploading": "running",
    "cancel_requested": "running",
    "completed": "succeeded",
    "error": "failed",
    "user_error": "failed",
    "cancelled": "cancelled",
}
_NUMBERS = ("step", "total_steps", "token_count", "param_count")


class Together:
    """Tuned models are served by endpoints of their own."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self.serving_url = str(calls.client.base_url).rstrip("/")
        self.serving_note = "Together serves most tuned models from a dedicated endpoint: start one first."

    def upload(self, path: Path, name: str) -> str:
        fields = {"purpose": "fine-tune", "file_name": name, "file_type": "jsonl"}
        return _text(self._calls.upload("/files/upload", path, name, fields), "id")

    def find_file(self, name: str, size: int) -> str | None:
        listed = _records(self._calls.get("/files"))
        return next(
            (_text(one, "id") for one in listed if (one.get("filename"), one.get("bytes")) == (name, size)), None
        )

    def file_ready(self, file: str) -> bool:
        return self._calls.get(f"/files/{file}").get("Processed") is not False

    def create(self, job: Job) -> str:
        options = job.options
        request: dict[str, Any] = {"model": options.model, "training_file": job.training_file}
        optional = {
            "validation_file": job.validation_file,
            # Without evaluations a validation file is ignored.
            "n_evals": None if job.validation_file is None else max(options.epochs or 1, 1),
            "n_epochs": options.epochs,
            "batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "suffix": options.suffix,
            "random_seed": options.seed,
        }
        request |= {name: value for name, value in optional.items() if value is not None}
        if options.method == "dpo":
            request["training_method"] = {"method": "dpo"} | (
                {} if options.beta is None else {"dpo_beta": options.beta}
            )
        else:
            request["training_method"] = {"method": "sft", "train_on_inputs": "auto"}
        if options.lora_rank is not None:
            # Twice the rank is the service's own default for the scale.
            request["training_type"] = {
                "type": "Lora",
                "lora_r": options.lora_rank,
                "lora_alpha": 2 * options.lora_rank,
            }
        return _text(self._calls.post("/fine-tunes", request), "id")

    def find_job(self, job: Job) -> str | None:
        listed = _records(self._calls.get("/fine-tunes"))
        return next((_text(one, "id") for one in listed if one.get("training_file") == job.training_file), None)

    def status(self, job: str) -> JobStatus:
        found = self._calls.get(f"/fine-tunes/{job}")
        said = str(found.get("status"))
        stage = _STAGES.get(said, "running")
        tokens = found.get("token_count")
        model = found.get("model_output_name") or found.get("output_name")
        failures = [event.message for event in _events(found.get("events")) if event.level == "error"]
        return JobStatus(
            id=job,
            stage=stage,
            said=said,
            model=str(model) if model and stage == "succeeded" else None,
            error=failures[-1] if stage == "failed" and failures else None,
            trained_tokens=tokens if isinstance(tokens, int) else None,
        )

    def events(self, job: str, known: Container[str] = ()) -> list[Event]:
        events = _events(_records(self._calls.get(f"/fine-tunes/{job}/events")))
        return [event for event in events if event.id not in known]

    def checkpoints(self, job: str) -> list[Checkpoint]:
        return []

    def cancel(self, job: str) -> None:
        self._calls.post(f"/fine-tunes/{job}/cancel", {}, repeatable=True)


def _events(listed: object) -> list[Event]:
    """Oldest first. They have no ids: what they say and when stands in for one."""
    events = []
    for one in listed if isinstance(listed, list) else []:
        if isinstance(one, Mapping):
            at, message = str(one.get("created_at", "")), str(one.get("message", ""))
            level = str(one.get("level") or "info").lower().removeprefix("legacy_")
            data = numbers({name: one.get(name) for name in _NUMBERS if one.get(name)})
            events.append(Event(f"{at} {message}", at[:19].replace("T", " "), level, message, data))
    return sorted(events, key=lambda event: event.at)


def _records(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    data = answer.get("data")
    return [one for one in data if isinstance(one, dict)] if isinstance(data, list) else []


def _text(answer: Mapping[str, Any], member: str) -> str:
    value = answer.get(member)
    if not isinstance(value, str) or not value:
        raise ProviderError(f"the answer has no {member}: is the base URL right?")
    return value
