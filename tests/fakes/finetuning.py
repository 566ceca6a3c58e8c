"""Fine-tuning services over real HTTP: OpenAI's shape by its published OpenAPI document, Together's and Fireworks'.

What is asked of OpenAI's, and what it answers, is held against the types that the `openai` library has from that
document.

All three stand at one address, under `/v1`, `/together/v1` and `/fireworks/v1`. A job moves on by one stage of
`stages` whenever it is looked at. `fail` scripts faults of the calls that come next.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qsl

from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.job_create_params import JobCreateParams
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from pydantic import BaseModel, TypeAdapter, ValidationError

from tests.fakes.finetuning_calls import Call, Refused, break_off, page
from tests.fakes.upstream import _lifespan, _send

KEY = "sk-the-secret-key-of-the-tests"
Kind = Literal["busy", "broken", "lost", "cut"]
"""429 with retry-after; 500; done, but the answer breaks off; nothing done, and the connection breaks off."""


@dataclass
class FakeFineTuning:
    """The ASGI app. Its records may be read from any thread."""

    stages: Sequence[str] = ("validating_files", "queued", "running", "running", "succeeded")
    calls: list[Call] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    looks_until_ready: int = 2
    """Looks at a file before Azure, Together and Fireworks have processed it."""
    refuses_files: bool = False
    holds: str | None = None
    """Calls of this `METHOD path` do their work, then answer only after `release`."""

    def __post_init__(self) -> None:
        self._faults: dict[str, list[Kind]] = {}
        self._numbers = itertools.count(1)
        self._looks: dict[str, int] = {}
        self._released = threading.Event()
        self.reached = threading.Event()
        """Set when a held call has done its work."""

    def fail(self, call: str, *kinds: Kind) -> None:
        """The next calls of `METHOD path` fail in these ways, one after another."""
        self._faults.setdefault(call, []).extend(kinds)

    def release(self) -> None:
        self._released.set()

    def made(self, method: str, path: str) -> int:
        """How often a call came."""
        return sum((call.method, call.path) == (method, path) for call in self.calls)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        name = f"{scope['method']} {scope['path']}"
        fault = self._faults[name].pop(0) if self._faults.get(name) else None
        if fault == "cut":
            await break_off(send)
        call = await self._take(scope, receive)
        self.calls.append(call)
        if fault == "busy":
            busy = {"error": {"message": "slow down", "type": "requests", "param": None, "code": "rate_limit"}}
            await _send(send, 429, json.dumps(busy).encode(), {"retry-after-ms": "1"})
            return
        if fault == "broken":
            await _send(send, 500, b'{"error": {"message": "scripted 500"}}', {})
            return
        status, body = self._answer(call)
        if self.holds == name:
            self.reached.set()
            await asyncio.to_thread(self._released.wait, 60)
        if fault == "lost":
            await break_off(send)
        await _send(send, status, json.dumps(body).encode(), {})

    async def _take(self, scope: Any, receive: Any) -> Call:
        raw, more = b"", True
        while more:
            message = await receive()
            raw += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        query = dict(parse_qsl(scope["query_string"].decode()))
        return Call(scope["method"], scope["path"], query, headers, raw)

    def _answer(self, call: Call) -> tuple[int, dict[str, Any]]:
        try:
            if call.headers.get("authorization") != f"Bearer {KEY}":
                raise Refused(
                    401, f"Incorrect API key provided: {call.headers.get('authorization')}", "invalid_api_key"
                )
            for pattern, handler in _ROUTES:
                found = re.fullmatch(pattern, f"{call.method} {call.path}")
                if found:
                    return 200, handler(self, call, *found.groups())
            raise Refused(404, f"Unknown request URL: {call.method} {call.path}")
        except Refused as error:
            return error.status, error.body

    # --- OpenAI -------------------------------------------------------------------------------------------------

    def upload(self, call: Call) -> dict[str, Any]:
        fields, name, content = call.form
        if fields.get("purpose") != "fine-tune" or not name.endswith(".jsonl"):
            raise Refused(400, "fine-tune files are .jsonl")
        kept = self._keep(name, content, {"status": "error" if self.refuses_files else "uploaded"})
        return _as(FileObject, kept)

    def _keep(self, name: str, content: bytes, more: dict[str, Any]) -> dict[str, Any]:
        file = {
            "id": f"file-{next(self._numbers)}",
            "object": "file",
            "bytes": len(content),
            "created_at": 1_700_000_000,
            "filename": name,
            "purpose": "fine-tune",
            **more,
        }
        self.files[file["id"]] = file
        self.contents[file["id"]] = content
        return file

    def list_files(self, call: Call) -> dict[str, Any]:
        return page(list(reversed(self.files.values())), call)

    def file(self, call: Call, file: str) -> dict[str, Any]:
        found = self._known(self.files, file)
        self._looks[file] = self._looks.get(file, 0) + 1
        if found.get("status") == "uploaded" and self._looks[file] >= self.looks_until_ready:
            found["status"] = "processed"
        return found

    def create(self, call: Call) -> dict[str, Any]:
        body = call.json
        try:
            _CREATE.validate_python(body)
        except ValidationError as error:
            raise Refused(400, str(error)) from error
        unknown = set(body) - _CREATE_FIELDS
        if unknown:
            raise Refused(400, f"Unrecognized request arguments: {sorted(unknown)}")
        for name in filter(None, (body["training_file"], body.get("validation_file"))):
            self._known(self.files, name)
        method = body.get("method")
        if method is not None:
            (settings,) = (value for name, value in method.items() if name != "type")
            allowed = {"n_epochs", "batch_size", "learning_rate_multiplier"}
            allowed |= {"beta"} if method["type"] == "dpo" else set()
            if set(settings["hyperparameters"]) - allowed or method["type"] not in method:
                raise Refused(400, f"bad method {method}")
        job = {
            "id": f"ftjob-{next(self._numbers)}",
            "object": "fine_tuning.job",
            "created_at": 1_700_000_000,
            "error": None,
            "fine_tuned_model": None,
            "finished_at": None,
            "hyperparameters": body.get("hyperparameters", {}),
            "organization_id": "org-test",
            "result_files": [],
            "seed": body.get("seed", 7),
            "status": self.stages[0],
            "trained_tokens": None,
            "validation_file": None,
            **body,
        }
        self.jobs[job["id"]] = job
        return _as(FineTuningJob, job)

    def list_jobs(self, call: Call) -> dict[str, Any]:
        return page(list(reversed(self.jobs.values())), call)

    def job(self, call: Call, job: str) -> dict[str, Any]:
        found = self._known(self.jobs, job)
        stage = self._stage(job, found["status"])
        found["status"] = stage
        if stage == "succeeded":
            found |= {"fine_tuned_model": f"ft:{found['model']}:org::{job}", "trained_tokens": 4321}
        if stage == "failed":
            found["error"] = {"code": "bad", "message": "the data taught nothing", "param": "training_file"}
        return _as(FineTuningJob, found)

    def _stage(self, job: str, now: str) -> str:
        if now.lower() in ("cancelled", "job_state_cancelled"):
            return now
        looks = self._looks[job] = self._looks.get(job, -1) + 1
        return self.stages[min(looks, len(self.stages) - 1)]

    def events(self, call: Call, job: str) -> dict[str, Any]:
        """One a look, newest first; the later ones with metrics."""
        self._known(self.jobs, job)
        happened = [
            {
                "id": f"ftevent-{number}",
                "object": "fine_tuning.job.event",
                "created_at": 1_700_000_000 + number // 2,
                "level": "info",
                "message": f"Step {number}",
                "type": "metrics",
                "data": {"step": number, "total_steps": 4, "train_loss": 1.0 / (number + 1), "note": "x"},
            }
            for number in range(self._looks.get(job, -1) + 1)
        ]
        return page([_as(FineTuningJobEvent, event) for event in reversed(happened)], call)

    def checkpoints(self, call: Call, job: str) -> dict[str, Any]:
        self._known(self.jobs, job)
        checkpoint = {
            "id": "ftckpt-1",
            "object": "fine_tuning.job.checkpoint",
            "created_at": 1_700_000_000,
            "fine_tuning_job_id": job,
            "fine_tuned_model_checkpoint": f"ft:{job}:ckpt-step-2",
            "step_number": 2,
            "metrics": {"step": 2, "train_loss": 0.5, "valid_loss": 0.75},
        }
        return {"object": "list", "data": [_as(FineTuningJobCheckpoint, checkpoint)], "has_more": False}

    def cancel(self, call: Call, job: str) -> dict[str, Any]:
        found = self._known(self.jobs, job)
        found["status"] = "cancelled"
        return found

    # --- Together -----------------------------------------------------------------------------------------------

    def together_upload(self, call: Call) -> dict[str, Any]:
        fields, name, content = call.form
        assert fields == {"purpose": "fine-tune", "file_name": name, "file_type": "jsonl"}
        return self._keep(name, content, {"FileType": "jsonl", "Processed": False})

    def together_files(self, call: Call) -> dict[str, Any]:
        return {"data": list(self.files.values())}

    def together_file(self, call: Call, file: str) -> dict[str, Any]:
        found = self._known(self.files, file)
        self._looks[file] = self._looks.get(file, 0) + 1
        found["Processed"] = self._looks[file] >= self.looks_until_ready
        return found

    def together_create(self, call: Call) -> dict[str, Any]:
        body = call.json
        self._known(self.files, body["training_file"])
        assert body["training_method"]["method"] in ("sft", "dpo")
        job = {"id": f"ft-{next(self._numbers)}", "status": "pending", **body}
        self.jobs[job["id"]] = job
        return job

    def together_jobs(self, call: Call) -> dict[str, Any]:
        return {"data": list(self.jobs.values())}

    def together_job(self, call: Call, job: str) -> dict[str, Any]:
        found = self._known(self.jobs, job)
        found["status"] = self._stage(job, found["status"])
        if found["status"] == "completed":
            found |= {"model_output_name": f"me/{found['model']}-{job}", "token_count": 99}
        return found

    def together_events(self, call: Call, job: str) -> dict[str, Any]:
        looks = self._looks.get(job, -1) + 1
        return {
            "data": [
                {
                    "object": "fine-tune-event",
                    "created_at": f"2026-01-31T09:00:0{number}.000Z",
                    "level": "info",
                    "message": f"Step {number}",
                    "type": "training_progress",
                    "step": number,
                    "total_steps": 4,
                }
                for number in range(looks)
            ]
        }

    # --- Fireworks ----------------------------------------------------------------------------------------------

    def dataset_create(self, call: Call) -> dict[str, Any]:
        name = call.json["datasetId"]
        if name in self.files:
            raise Refused(409, f"dataset {name} already exists", "ALREADY_EXISTS")
        assert set(call.json["dataset"]) == {"userUploaded", "exampleCount", "format"}
        self.files[name] = {"name": f"accounts/me/datasets/{name}", "state": "UPLOADING"} | call.json["dataset"]
        return self.files[name]

    def dataset_upload(self, call: Call, name: str) -> dict[str, Any]:
        self._known(self.files, name)
        _, _, content = call.form
        self.contents[name] = content
        self.files[name]["state"] = "READY"
        return {}

    def dataset(self, call: Call, name: str) -> dict[str, Any]:
        return self._known(self.files, name)

    def fireworks_create(self, call: Call, kind: str) -> dict[str, Any]:
        name = call.query["dpoJobId" if kind == "dpoJobs" else "supervisedFineTuningJobId"]
        if name in self.jobs:
            raise Refused(409, f"job {name} already exists", "ALREADY_EXISTS")
        self._known(self.files, call.json["dataset"].rpartition("/")[2])
        self.jobs[name] = {"name": f"accounts/me/{kind}/{name}", "state": "JOB_STATE_CREATING"} | call.json
        return self.jobs[name]

    def fireworks_job(self, call: Call, _: str, job: str) -> dict[str, Any]:
        found = self._known(self.jobs, job)
        found["state"] = self._stage(job, found["state"])
        found["jobProgress"] = {"percent": min(100, 25 * self._looks.get(job, 0))}
        return found

    def fireworks_cancel(self, call: Call, _: str, job: str) -> dict[str, Any]:
        self._known(self.jobs, job)["state"] = "JOB_STATE_CANCELLED"
        return {}

    @staticmethod
    def _known(records: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
        if name not in records:
            raise Refused(404, f"no such thing: {name}")
        return records[name]


_CREATE = TypeAdapter(JobCreateParams)
_CREATE_FIELDS = {
    *("model", "training_file", "validation_file", "suffix", "seed", "metadata", "method", "hyperparameters"),
    "integrations",
}
_T, _F = "/together/v1", "/fireworks/v1/accounts/me"
_JOBS = "(supervisedFineTuningJobs|dpoJobs)"
_ROUTES: list[tuple[str, Any]] = [
    (r"POST /v1/files", FakeFineTuning.upload),
    (r"GET /v1/files", FakeFineTuning.list_files),
    (r"GET /v1/files/([^/]+)", FakeFineTuning.file),
    (r"POST /v1/fine_tuning/jobs", FakeFineTuning.create),
    (r"GET /v1/fine_tuning/jobs", FakeFineTuning.list_jobs),
    (r"GET /v1/fine_tuning/jobs/([^/]+)", FakeFineTuning.job),
    (r"GET /v1/fine_tuning/jobs/([^/]+)/events", FakeFineTuning.events),
    (r"GET /v1/fine_tuning/jobs/([^/]+)/checkpoints", FakeFineTuning.checkpoints),
    (r"POST /v1/fine_tuning/jobs/([^/]+)/cancel", FakeFineTuning.cancel),
    (rf"POST {_T}/files/upload", FakeFineTuning.together_upload),
    (rf"GET {_T}/files", FakeFineTuning.together_files),
    (rf"GET {_T}/files/([^/]+)", FakeFineTuning.together_file),
    (rf"POST {_T}/fine-tunes", FakeFineTuning.together_create),
    (rf"GET {_T}/fine-tunes", FakeFineTuning.together_jobs),
    (rf"GET {_T}/fine-tunes/([^/]+)", FakeFineTuning.together_job),
    (rf"GET {_T}/fine-tunes/([^/]+)/events", FakeFineTuning.together_events),
    (rf"POST {_T}/fine-tunes/([^/]+)/cancel", FakeFineTuning.cancel),
    (rf"POST {_F}/datasets", FakeFineTuning.dataset_create),
    (rf"POST {_F}/datasets/([^/:]+):upload", FakeFineTuning.dataset_upload),
    (rf"GET {_F}/datasets/([^/]+)", FakeFineTuning.dataset),
    (rf"POST {_F}/{_JOBS}", FakeFineTuning.fireworks_create),
    (rf"GET {_F}/{_JOBS}/([^/:]+)", FakeFineTuning.fireworks_job),
    (rf"POST {_F}/{_JOBS}/([^/:]+):cancel", FakeFineTuning.fireworks_cancel),
]


def _as(kind: type[BaseModel], answer: dict[str, Any]) -> dict[str, Any]:
    """The answer, after a look whether the document allows it."""
    kind.model_validate(answer)
    return answer
