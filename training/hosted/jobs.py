"""`winnow hosted create`, `status` and `cancel`: a prepared folder becomes a job, once, whatever happens in between.

`job.json` beside the files is written ahead: before a file is sent or a job asked for it says so, and afterwards what
came of it. A process that finds an intent without an outcome looks at the provider for what its predecessor left
behind, by the file's name or the job's file, before it tries again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from training.hosted.prepare import Prepared, check_files
from training.hosted.providers import ENDED, Event, Job, JobStatus, Provider, ProviderError, Split
from training.hosted.record import RECORD_FILE, JobRecord, Made
from training.hosted.transport import LONGEST_PAUSE_S, Unfinished, made_once
from training.options import OptionsError

Wait = Callable[[float], None]


@dataclass(slots=True)
class _Making:
    """A creation at work: the record follows every step."""

    prepared: Prepared
    provider: Provider
    record: JobRecord
    say: Callable[[str], None]
    wait: Wait

    @property
    def folder(self) -> Path:
        assert self.prepared.folder is not None
        return self.prepared.folder

    def made(
        self, name: Literal["train", "validation", "job"], make: Callable[[], str], find: Callable[[], str | None]
    ) -> str:
        """The id of what is made, or was made before."""
        known: Made = getattr(self.record, name)
        if known.state == "done" and known.id is not None:
            return known.id
        self._save(name, Made("asked"))
        tries = self.prepared.options.max_tries
        made = made_once(make, find, doubtful=known.state == "asked", max_tries=tries, wait=self.wait)
        self._save(name, Made("done", made))
        return made

    def _save(self, name: Literal["train", "validation", "job"], made: Made) -> None:
        changed: dict[str, Made] = {name: made}
        self.record = replace(self.record, **changed)  # type: ignore[arg-type]  # names of Made fields only
        self.record.save(self.folder)

    def file(self, split: Split) -> str | None:
        """The id of a split's file, sent and processed."""
        facts = self.prepared.facts(split)
        if facts is None:
            return None
        path, name = self.prepared.file(split), f"{self.prepared.run}-{split}.jsonl"
        self.say(f"Sending {path.name} ({facts.size_bytes / 1e6:.1f} MB) …")
        file = self.made(
            split,
            lambda: self.provider.upload(path, name),
            lambda: self.provider.find_file(name, facts.size_bytes),
        )
        self.say(f"Waiting for {path.name} to be processed …")
        self._until_ready(file)
        return file

    def _until_ready(self, file: str) -> None:
        options = self.prepared.options
        for waited in range(int(options.file_timeout_s / options.poll_s) + 1):
            if waited:
                self.wait(options.poll_s)
            if self.provider.file_ready(file):
                return
        raise ProviderError(
            f"the file {file} was not processed within {options.file_timeout_s:g} s; the same command goes on from here"
        )


def create_job(
    prepared: Prepared, provider: Provider, *, say: Callable[[str], None] = lambda _: None, wait: Wait = time.sleep
) -> str:
    """Uploads and creates what is not there yet; the job's id. Raises `OptionsError` and `ProviderError`.

    To be called again after any failure, or in a new process after a kill. `say` is told of each step.
    """
    assert prepared.folder is not None
    with _alone(prepared.folder):
        record = JobRecord.load(prepared.folder) or JobRecord(prepared.run)
        if record.run != prepared.run:
            raise OptionsError(
                f"{prepared.folder}: {RECORD_FILE} belongs to other settings or data: prepare into another folder"
            )
        if record.job.state == "done" and record.job.id is not None:
            return record.job.id
        check_files(prepared)
        making = _Making(prepared, provider, record, say, wait)
        training, validation = making.file("train"), making.file("validation")
        assert training is not None
        job = Job(prepared.run, prepared.options, training, validation)
        say("Creating the job …")
        return making.made("job", lambda: provider.create(job), lambda: provider.find_job(job))


def job_of(folder: Path) -> str:
    """The job that was created from a folder. Raises `OptionsError`."""
    record = JobRecord.load(folder)
    if record is None or record.job.id is None:
        raise OptionsError(f"{folder}: no job was created from it: run `winnow hosted create {folder}`")
    return record.job.id


def followed(
    provider: Provider, job: str, poll_s: float, *, max_tries: int = 6, wait: Wait = time.sleep
) -> Iterator[tuple[JobStatus, list[Event]]]:
    """How the job stands, with the events that are new, again and again until it has ended.

    An outage is waited for, `max_tries` looks in a row. Raises `ProviderError` afterwards.
    """
    told: set[str] = set()
    failures = 0
    while True:
        try:
            status = provider.status(job)
            events = provider.events(job, told)
        except Unfinished:
            failures += 1
            if failures >= max_tries:
                raise
            wait(max(poll_s, min(poll_s * 2**failures, LONGEST_PAUSE_S)))
            continue
        failures = 0
        told.update(event.id for event in events)
        yield status, events
        if status.stage in ENDED:
            return
        wait(poll_s)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time creates from a folder. Raises `OptionsError` for the second."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OptionsError(f"{folder}: another process is creating a job from it") from error
        yield
