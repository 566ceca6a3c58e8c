"""Jobs at a real HTTP server: made once, whatever fails in between, and followed to their end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Mount

from tests.fakes.finetuning import KEY, FakeFineTuning
from tests.fakes.serving import serving
from training.hosted.jobs import create_job, followed, job_of
from training.hosted.options import HostedOptions
from training.hosted.prepare import Prepared, prepare
from training.hosted.providers import Event, JobStatus, ProviderError
from training.hosted.services import connect
from training.hosted.transport import Unfinished, made_once
from training.options import OptionsError

PROVIDERS = ("openai", "azure", "nebius", "together", "fireworks")
PREFIXES = {"together": "/together/v1", "fireworks": "/fireworks/v1"}
MAKING = {
    "openai": ("POST /v1/files", "POST /v1/fine_tuning/jobs"),
    "together": ("POST /together/v1/files/upload", "POST /together/v1/fine-tunes"),
    "fireworks": (
        "POST /fireworks/v1/accounts/me/datasets",
        "POST /fireworks/v1/accounts/me/supervisedFineTuningJobs",
    ),
}
LOOKING = {
    "openai": ("GET /v1/files", "GET /v1/fine_tuning/jobs"),
    "together": ("GET /together/v1/files", "GET /together/v1/fine-tunes"),
    "fireworks": (
        "GET /fireworks/v1/accounts/me/datasets/{run}-train",
        "GET /fireworks/v1/accounts/me/supervisedFineTuningJobs/{run}",
    ),
}
"""What finds that which was made."""
STAGES = {
    "together": ("pending", "queued", "running", "running", "completed"),
    "fireworks": ("JOB_STATE_VALIDATING", "JOB_STATE_PENDING", "JOB_STATE_RUNNING", "JOB_STATE_COMPLETED"),
}


class Place:
    """A service, its address, and folders prepared for it."""

    def __init__(self, fake: FakeFineTuning, url: str, folder: Path) -> None:
        self.fake, self.url, self.folder = fake, url, folder

    def create(self, prepared: Prepared, say: Callable[[str], None] = lambda _: None) -> str:
        with connect(prepared.options) as service:
            return create_job(prepared, service, say=say, wait=no_wait)

    def follow(self, prepared: Prepared, job: str) -> list[tuple[JobStatus, list[Event]]]:
        with connect(prepared.options) as service:
            return list(followed(service, job, 0.001, wait=no_wait))

    def prepared(self, provider: str, **settings: Any) -> Prepared:
        method = settings.get("method", "sft")
        files = {}
        for split, numbers in (("train", range(10)), ("validation", range(20, 22))):
            file = self.folder / f"{method}-{split}.jsonl"
            pair = {"chosen": "good", "rejected": "bad"} if method == "dpo" else {"completion": "good"}
            records = [{"prompt": f"p{number}"} | pair for number in numbers]
            file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            files[split] = [str(file)]
        if (provider, method) == ("fireworks", "dpo"):
            del files["validation"]
        if provider in STAGES:
            self.fake.stages = STAGES[provider]
        given = {
            "provider": provider,
            "model": "base-model",
            "output": str(self.folder / "out"),
            "base_url": self.url + PREFIXES.get(provider, "/v1"),
            "account": "me",
            "poll_s": 0.001,
            "key_variable": "SECRET",
        }
        return prepare(HostedOptions.model_validate(given | files | settings))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("SECRET", KEY)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-the-environment")
    fake = FakeFineTuning()
    with serving(fake) as url:
        yield Place(fake, url, tmp_path)
    fake.release()


def no_wait(seconds: float) -> None:
    """Back-off is not what these tests are about."""


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_folder_becomes_a_job_and_the_job_a_model(provider: str, method: str, place: Place) -> None:
    if (provider, method) == ("nebius", "dpo"):
        with pytest.raises(OptionsError, match="offers no dpo"):
            place.prepared(provider, method=method)
        return
    settings: dict[str, Any] = {"method": method, "epochs": 2, "suffix": "mine"}
    settings |= {"beta": 0.25} if method == "dpo" else {}
    prepared = place.prepared(provider, **settings)
    steps: list[str] = []
    job = place.create(prepared, steps.append)
    assert steps[-1] == "Creating the job …"
    assert prepared.folder is not None
    assert job_of(prepared.folder) == job
    for split in ("train", "validation"):
        if prepared.facts(split) is not None:  # type: ignore[arg-type]  # both are splits
            assert (prepared.folder / f"{split}.jsonl").read_bytes() in place.fake.contents.values()
    (created,) = place.fake.jobs.values()
    expected = WIRES[provider, method]
    assert {name: created.get(name) for name in expected} == expected
    told = {call.headers.get("openai-organization") for call in place.fake.calls}
    assert told == {"org-of-the-environment" if provider == "openai" else None}
    *_, (status, _) = place.follow(prepared, job)
    assert status.stage == "succeeded"
    assert status.model
    # Once more changes nothing.
    calls = len(place.fake.calls)
    assert place.create(prepared) == job
    assert len(place.fake.calls) == calls


HYPER = {"n_epochs": 2}
SUPERVISED = {"type": "supervised", "supervised": {"hyperparameters": HYPER}}
PREFERENCE = {"type": "dpo", "dpo": {"hyperparameters": HYPER | {"beta": 0.25}}}
WIRES: dict[tuple[str, str], dict[str, Any]] = {
    ("openai", "sft"): {"model": "base-model", "suffix": "mine", "method": SUPERVISED, "training_file": "file-1"},
    ("openai", "dpo"): {"method": PREFERENCE, "validation_file": "file-2"},
    ("azure", "sft"): {"method": SUPERVISED},
    ("azure", "dpo"): {"method": PREFERENCE},
    ("nebius", "sft"): {"hyperparameters": HYPER, "method": None, "metadata": None},
    ("together", "sft"): {
        "n_epochs": 2,
        "n_evals": 2,
        "training_method": {"method": "sft", "train_on_inputs": "auto"},
        "validation_file": "file-2",
    },
    ("together", "dpo"): {"training_method": {"method": "dpo", "dpo_beta": 0.25}, "suffix": "mine"},
    ("fireworks", "sft"): {"baseModel": "base-model", "epochs": 2},
    ("fireworks", "dpo"): {"lossConfig": {"method": "DPO", "klBeta": 0.25}},
}


@pytest.mark.parametrize("fault", ["busy", "broken", "lost", "cut"])
@pytest.mark.parametrize("provider", MAKING)
def test_whatever_fails_nothing_is_made_twice(provider: str, fault: Any, place: Place) -> None:
    prepared = place.prepared(provider)
    for call in MAKING[provider]:
        place.fake.fail(call, fault, fault)
    place.create(prepared)
    assert len(place.fake.files) == len(place.fake.contents) == 2
    assert len(place.fake.jobs) == 1


@pytest.mark.parametrize("fault", ["lost", "cut"])
@pytest.mark.parametrize("provider", MAKING)
def test_a_new_process_finds_what_the_last_one_left(provider: str, fault: Any, place: Place) -> None:
    """Each call that makes something ends a process, before it could look whether the work was done over there."""
    prepared = place.prepared(provider, max_tries=1)
    for call, looking in zip(MAKING[provider], LOOKING[provider], strict=True):
        place.fake.fail(call, fault)
        place.fake.fail(looking.format(run=prepared.run), "broken")
        with pytest.raises(ProviderError):
            place.create(prepared)
    place.create(prepared)
    assert len(place.fake.files) == len(place.fake.contents) == 2
    assert len(place.fake.jobs) == 1


OUTCOMES = st.lists(st.lists(st.sampled_from(["well", "busy", "lost", "cut"]), max_size=4), min_size=1, max_size=4)


@given(OUTCOMES)
def test_no_order_of_failures_makes_a_thing_twice(processes: list[list[str]]) -> None:
    """Processes one after another, each with what happens to its tries; the first knows that none was before it."""
    things: list[str] = []
    coming: list[str] = []

    def make() -> str:
        outcome = coming.pop(0) if coming else "well"
        if outcome in ("well", "lost"):
            things.append(f"thing-{len(things)}")
        if outcome != "well":
            raise Unfinished(outcome, doubtful=outcome != "busy")
        return things[-1]

    def find() -> str | None:
        return things[0] if things else None

    made = None
    for number, outcomes in enumerate(processes):
        coming[:] = outcomes
        try:
            made = made_once(make, find, doubtful=number > 0, max_tries=2, wait=no_wait)
        except Unfinished:
            continue
        assert made == "thing-0"
    assert len(things) <= 1
    assert (made is not None) or not things


def test_a_killed_process_has_uploaded_once(place: Place) -> None:
    prepared = place.prepared("openai")
    place.fake.holds = "POST /v1/files"
    command = [sys.executable, "-m", "winnow", "hosted", "create", str(prepared.folder)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert place.fake.reached.wait(60), "the upload never came"
        # The file is over there, the answer on its way.
        with pytest.raises(OptionsError, match="another process is creating a job"):
            place.create(prepared)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    place.fake.holds = None
    place.fake.release()
    place.create(prepared)
    assert sorted(file["filename"] for file in place.fake.files.values()) == [
        f"{prepared.run}-train.jsonl",
        f"{prepared.run}-validation.jsonl",
    ]
    assert len(place.fake.jobs) == 1


def test_other_jobs_and_files_are_not_taken_for_ours(place: Place) -> None:
    """Lists have pages of two; ours is behind them, or not there at all."""
    first = place.prepared("openai", seed=1, output=str(place.folder / "first"))
    place.create(first)
    for number in range(3):
        place.fake.files[f"other-{number}"] = dict(place.fake.files["file-1"], id=f"other-{number}", filename="a.jsonl")
    second = place.prepared("openai", seed=2, output=str(place.folder / "second"))
    place.fake.fail("POST /v1/files", "lost", "cut")
    place.fake.fail("POST /v1/fine_tuning/jobs", "cut", "lost")
    place.create(second)
    assert [job["seed"] for job in place.fake.jobs.values()] == [1, 2]
    assert len({job["training_file"] for job in place.fake.jobs.values()}) == 2


def test_waiting_is_as_long_as_the_service_says(place: Place) -> None:
    prepared = place.prepared("openai")
    place.fake.fail("POST /v1/files", "busy", "busy", "broken")
    pauses: list[float] = []
    with connect(prepared.options) as service:
        create_job(prepared, service, wait=pauses.append)
    assert pauses[:2] == [0.001, 0.001]
    assert 1.5 <= pauses[2] <= 2.0, "the third try: half a second doubled twice, less up to a quarter"


def test_it_gives_up_in_the_end_and_says_where(place: Place) -> None:
    prepared = place.prepared("openai", max_tries=3)
    place.fake.fail("POST /v1/files", *["broken"] * 3)
    with pytest.raises(ProviderError, match=r"POST /files was answered 500: scripted 500"):
        place.create(prepared)
    assert place.fake.made("POST", "/v1/files") == 3
    assert place.fake.jobs == {}


@pytest.mark.parametrize("answer", ["<html>welcome</html>", {}])
def test_a_base_url_of_something_else_is_told(answer: str | dict[str, str], place: Place) -> None:
    page = HTMLResponse(answer) if isinstance(answer, str) else JSONResponse(answer)
    with serving(Starlette(routes=[Mount("/", page)])) as url:
        prepared = place.prepared("openai", base_url=url)
        with pytest.raises(ProviderError, match="has no id: is the base URL right"):
            place.create(prepared)
        with pytest.raises(ProviderError, match="has no id: is the base URL right"):
            place.follow(prepared, "ftjob-1")


@pytest.mark.parametrize("said", ["error", "user_error"])
def test_together_says_why_it_failed(said: str, place: Place) -> None:
    prepared = place.prepared("together")
    place.fake.stages = ("running", said)
    (*_, (status, _)) = place.follow(prepared, place.create(prepared))
    assert status.stage == "failed"


def test_a_refused_file_stops_before_the_job(place: Place) -> None:
    place.fake.refuses_files = True
    prepared = place.prepared("openai")
    with pytest.raises(ProviderError, match="file-1 was refused"):
        place.create(prepared)
    assert place.fake.jobs == {}


def test_an_unprocessed_file_is_waited_for_within_limits(place: Place) -> None:
    place.fake.looks_until_ready = 10**6
    prepared = place.prepared("azure", file_timeout_s=0.01)
    with pytest.raises(ProviderError, match=r"not processed within 0\.01 s; the same command goes on"):
        place.create(prepared)
    place.fake.looks_until_ready = 1
    place.create(prepared)
    assert len(place.fake.files) == 2


def test_the_key_shows_nowhere(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "sk-wrong-but-secret"
    prepared = place.prepared("openai")
    monkeypatch.setenv("SECRET", wrong)
    with pytest.raises(ProviderError, match=r"401: Incorrect API key provided: Bearer \*\*\*") as refused:
        place.create(prepared)
    assert wrong not in str(refused.value)
    monkeypatch.setenv("SECRET", KEY)
    place.create(prepared)
    assert prepared.folder is not None
    written = b"".join(path.read_bytes() for path in prepared.folder.iterdir())
    assert KEY.encode() not in written
    assert wrong.encode() not in written


def test_without_a_key_nothing_is_asked(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = place.prepared("together")
    monkeypatch.delenv("SECRET")
    with pytest.raises(OptionsError, match="SECRET is not set: it holds the key of together"):
        place.create(prepared)
    assert place.fake.calls == []


def test_a_folder_with_another_jobs_record_is_refused(place: Place) -> None:
    prepared = place.prepared("openai")
    assert prepared.folder is not None
    place.create(prepared)
    record = prepared.folder / "job.json"
    record.write_text(record.read_text(encoding="utf-8").replace(prepared.run, "winnow-other"), encoding="utf-8")
    with pytest.raises(OptionsError, match=r"job\.json belongs to other settings or data"):
        place.create(prepared)
    record.write_text("{", encoding="utf-8")
    with pytest.raises(OptionsError, match=r"job\.json: cannot be read"):
        place.create(prepared)


@pytest.mark.parametrize("provider", ["openai", "together"])
def test_events_are_told_once_and_in_order(provider: str, place: Place) -> None:
    prepared = place.prepared(provider)
    job = place.create(prepared)
    seen = place.follow(prepared, job)
    assert [status.stage for status, _ in seen] == ["validating", "queued", "running", "running", "succeeded"]
    events = [event for _, some in seen for event in some]
    assert [event.message for event in events] == [f"Step {number}" for number in range(5)]
    assert events[2].metrics["step"] == 2
    assert all(isinstance(value, float) for event in events for value in event.metrics.values())


def test_an_outage_is_waited_for(place: Place) -> None:
    prepared = place.prepared("openai", max_tries=1)
    job = place.create(prepared)
    path = f"GET /v1/fine_tuning/jobs/{job}"
    place.fake.fail(path, "broken", "cut", "busy")
    assert [status.stage for status, _ in place.follow(prepared, job)][-1] == "succeeded"
    place.fake.fail(path, *["broken"] * 6)
    with pytest.raises(ProviderError, match="500"):
        place.follow(prepared, job)
