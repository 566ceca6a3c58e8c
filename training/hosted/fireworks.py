"""Fireworks' fine-tuning API (docs.fireworks.ai/api-reference): datasets, then a job resource for each method.

Names of datasets, jobs and models are ours to choose, so that nothing can be made twice: they are made of the run.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from training.hosted.options import HostedOptions
from training.hosted.providers import Checkpoint, Event, Job, JobStage, JobStatus, ProviderError
from training.hosted.transport import Calls, NotThere, Unfinished

_STAGES: Mapping[str, JobStage] = {
    "CREATING": "validating",
    "VALIDATING": "validating",
    "PENDING": "queued",
    "RE_QUEUEING": "queued",
    "RUNNING": "running",
    "WRITING_RESULTS": "running",
    "EVALUATION": "running",
    "CANCELLING": "running",
    "DELETING": "running",
    "COMPLETED": "succeeded",
    "EARLY_STOPPED": "succeeded",
    "FAILED": "failed",
    "FAILED_CLEANING_UP": "failed",
    "EXPIRED": "failed",
    "CANCELLED": "cancelled",
    "DELETED": "cancelled",
    "ARCHIVED": "cancelled",
}


class Fireworks:
    """A file is a dataset; ids here are resource ids, without `accounts/…` before them."""

    def __init__(self, calls: Calls, options: HostedOptions) -> None:
        self._calls = calls
        self._account = f"/accounts/{options.account}"
        self._is_dpo = options.method == "dpo"
        base = str(calls.client.base_url).rstrip("/")
        # Answers are given under another path than training's.
        self.serving_url = re.sub(r"/v1$", "/inference/v1", base)
        self.serving_note = "Fireworks serves a tuned model after you deploy it."

    def upload(self, path: Path, name: str) -> str:
        """The dataset's record, which may be there already, and then its file."""
        dataset = name.removesuffix(".jsonl")
        with path.open("rb") as file:
            rows = sum(1 for _ in file)
        record = {"datasetId": dataset, "dataset": {"userUploaded": {}, "exampleCount": str(rows), "format": "CHAT"}}
        try:
            self._calls.post(f"{self._account}/datasets", record)
        except Unfinished as error:
            try:
                self._dataset(dataset)
            except NotThere:
                raise error from None
        self._calls.upload(f"{self._account}/datasets/{dataset}:upload", path, name, {})
        return dataset

    def find_file(self, name: str, size: int) -> str | None:
        """Only a dataset whose file has arrived counts: the record alone is made before it."""
        dataset = name.removesuffix(".jsonl")
        try:
            return dataset if self.file_ready(dataset) else None
        except NotThere:
            return None

    def file_ready(self, file: str) -> bool:
        return self._dataset(file).get("state") == "READY"

    def _dataset(self, dataset: str) -> dict[str, Any]:
        return self._calls.get(f"{self._account}/datasets/{dataset}")

    @property
    def _jobs(self) -> str:
        return f"{self._account}/{'dpoJobs' if self._is_dpo else 'supervisedFineTuningJobs'}"

    def create(self, job: Job) -> str:
        options, account = job.options, self._account.lstrip("/")
        training: dict[str, Any] = {
            "baseModel": options.model,
            "outputModel": f"{account}/models/{'-'.join(filter(None, (job.run, options.suffix)))}",
        }
        optional = {
            "epochs": options.epochs,
            "batchSizeSamples": options.batch_size,
            "learningRate": options.learning_rate,
            "loraRank": options.lora_rank,
        }
        training |= {name: value for name, value in optional.items() if value is not None}
        request: dict[str, Any] = {"dataset": f"{account}/datasets/{job.training_file}", "displayName": job.run}
        if self._is_dpo:
            loss = {"method": "DPO"} | ({} if options.beta is None else {"klBeta": options.beta})
            request |= {"trainingConfig": training, "lossConfig": loss}
        else:
            request |= training
            if job.validation_file is not None:
                request["evaluationDataset"] = f"{account}/datasets/{job.validation_file}"
        id_name = "dpoJobId" if self._is_dpo else "supervisedFineTuningJobId"
        made = self._calls.post(self._jobs, request, {id_name: job.run})
        return str(made.get("name") or job.run).rpartition("/")[2]

    def find_job(self, job: Job) -> str | None:
        try:
            self._calls.get(f"{self._jobs}/{job.run}")
        except NotThere:
            return None
        return job.run

    def status(self, job: str) -> JobStatus:
        found = self._calls.get(f"{self._jobs}/{job}")
        said = str(found.get("state", "unknown"))
        stage = _STAGES.get(said.removeprefix("JOB_STATE_"), "running")
        config = found.get("trainingConfig") if self._is_dpo else found
        model = config.get("outputModel") if isinstance(config, Mapping) else None
        status, progress = found.get("status"), found.get("jobProgress")
        message = status.get("message") if isinstance(status, Mapping) else None
        share = progress.get("percent") if isinstance(progress, Mapping) else None
        return JobStatus(
            id=job,
            stage=stage,
            said=said,
            model=str(model) if model and stage == "succeeded" else None,
            error=str(message) if message and stage == "failed" else None,
            progress=share / 100 if isinstance(share, int | float) else None,
        )

    def events(self, job: str, known: Container[str] = ()) -> list[Event]:
        """The service keeps none."""
        return []

    def checkpoints(self, job: str) -> list[Checkpoint]:
        return []

    def cancel(self, job: str) -> None:
        try:
            self._calls.post(f"{self._jobs}/{job}:cancel", {}, repeatable=True)
        except NotThere as error:
            raise ProviderError(f"{error} (the job is gone)") from error
