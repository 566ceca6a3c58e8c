"""Completions for many prompts, drawn many at a time: what is still missing, what came, what failed.

Where completions come from is handed in as `generate`. What came is kept on disk at once, a whole line a prompt: a run
that is killed loses what was under way, and the next one asks only for the rest.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from feedback.jsonl import DataError, Skipped, located_records, write_records
from feedback.records import Messages, Prompt, RecordError, parse_completions, parse_prompt

PARTIAL_SUFFIX = ".partial"
_SEED_SPACE = 2**31
"""What every server takes for a seed."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. What is None is left to the model's own default."""

    count: int = 1
    """Completions a prompt."""
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    """Longest completion."""
    stop: tuple[str, ...] = ()
    seed: int | None = None
    """Of the whole run; each prompt's own is derived from it."""
    body: Mapping[str, Any] = field(default_factory=dict)
    """More members of the request."""

    def as_record(self) -> dict[str, Any]:
        """What was set, as plain values: stands in every record that was drawn so."""
        members = {
            "count": self.count,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "stop": list(self.stop) or None,
            "seed": self.seed,
            "body": dict(self.body) or None,
        }
        return {name: value for name, value in members.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Drawn:
    """One completion as it came."""

    completion: Messages
    finish_reason: str | None = None
    """`stop`, `length` …, as the model's server says it."""
    seed: int | None = None


class GenerationError(Exception):
    """The completions of a prompt cannot be had, retries included. `hopeless`: nor can those of any other."""

    def __init__(self, message: str, *, hopeless: bool = False) -> None:
        super().__init__(message)
        self.hopeless = hopeless


class Generate(Protocol):
    """Where completions come from."""

    async def __call__(self, prompt: Messages, count: int, seed: int | None) -> Sequence[Drawn]:
        """So many completions. With a `seed`, that of the i-th is `seed + i`. Raises `GenerationError`."""


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt to draw completions for."""

    prompt: Prompt
    key: str
    """Tells it from all others of the run; the same wherever the prompt stands in its file."""
    place: str
    """`file:line`."""

    def seed(self, of_run: int | None) -> int | None:
        """The prompt's own: another one for every prompt, whatever stands around it."""
        if of_run is None:
            return None
        digest = hashlib.sha256(f"{of_run} {self.key}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % _SEED_SPACE


@dataclass(frozen=True, slots=True)
class Failure:
    """A prompt without completions, and why."""

    place: str
    problem: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run over many prompts ended."""

    failures: Sequence[Failure]
    not_asked: int = 0
    """Prompts that were given up without a try, since nothing suggested that they would fare better."""


def read_tasks(files: Sequence[Path], skipped: Skipped | None = None) -> list[Task]:
    """Every prompt of the files. One that stands there twice is drawn for twice. Raises `DataError`."""
    return tasks_of(located_records(files, parse_sendable, skipped))


def parse_sendable(record: Mapping[str, Any]) -> Prompt:
    """A prompt that can be asked. Raises `RecordError`, also for half a character: no request can hold it."""
    prompt = parse_prompt(record)
    try:
        json.dumps(list(prompt.prompt), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RecordError("prompt", "holds half a character, which UTF-8 cannot") from error
    return prompt


def tasks_of(prompts: Iterable[tuple[str, Prompt]]) -> list[Task]:
    """Prompts with their places as tasks."""
    seen: Counter[str] = Counter()
    tasks = []
    for place, prompt in prompts:
        known = prompt_key(prompt.prompt)
        tasks.append(Task(prompt, f"{known}/{seen[known]}", place))
        seen[known] += 1
    return tasks


def prompt_key(prompt: Messages) -> str:
    """A digest of the messages."""
    return hashlib.sha256(json.dumps(list(prompt), sort_keys=True).encode()).hexdigest()[:32]


async def draw_all(
    tasks: Sequence[Task],
    generate: Generate,
    sampling: Sampling,
    keep: Callable[[Task, Sequence[Drawn]], None],
    *,
    at_once: int,
    max_failures_in_a_row: int,
    on_done: Callable[[], None] = lambda: None,
) -> Outcome:
    """Draws for `at_once` prompts at a time and hands each one's completions to `keep`, in the order they come.

    A prompt that fails is no error; the run goes on with the next, until so many failed in a row, or one said that it
    is hopeless: what has not begun by then is not asked. Cancelling cancels what is under way.
    """
    waiting = iter(tasks)
    failures: list[Failure] = []
    in_a_row, num_begun, hopeless = 0, 0, False

    async def work() -> None:
        nonlocal in_a_row, num_begun, hopeless
        for task in waiting:
            num_begun += 1
            try:
                drawn = await generate(task.prompt.prompt, sampling.count, task.seed(sampling.seed))
            except GenerationError as error:
                failures.append(Failure(task.place, str(error)))
                in_a_row += 1
                hopeless = hopeless or error.hopeless
            else:
                in_a_row = 0
                keep(task, drawn)
            on_done()
            if hopeless or in_a_row >= max_failures_in_a_row:
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(min(at_once, len(tasks))):
            group.create_task(work())
    return Outcome(failures, len(tasks) - num_begun)


class Draft:
    """The file beside the output that completions are kept in while a run is under way. Use as a context manager.

    JSON lines in the order of coming; a last line that a kill cut off is dropped. What the output itself holds from an
    earlier run over fewer prompts is taken over.
    """

    def __init__(self, output: Path, tasks: Sequence[Task], sampling: Sampling) -> None:
        """Raises `DataError` for a name that records cannot be written to."""
        if output.suffix == ".parquet":
            raise DataError(f"{output}: records are written as JSON lines: name the file .jsonl or .jsonl.gz")
        self._output = output
        self._tasks = tasks
        self._model = ""
        self._sampling = sampling
        self.path = output.with_name(output.name + PARTIAL_SUFFIX)
        self._file: IO[bytes] | None = None
        self._lines: dict[str, tuple[int, int]] = {}  # key: offset and length in the file
        self.output_was_whole = False
        """The output was there already, with all that is asked for."""

    def __enter__(self) -> Draft:
        return self

    def begin(self, model: str) -> list[Task]:
        """Takes up what is there, and says what is missing.

        Raises `DataError` where what is there is of another model, another sampling or other prompts.
        """
        self._model = model
        # What is no good is refused before a file is made.
        records = list(self._recorded(self._output)) if self._output.is_file() else []
        kept = list(self._whole_lines()) if self.path.is_file() else []
        self._output.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        self._file.truncate(sum(len(line) for _, line in kept))
        offset = 0
        for key, line in kept:
            self._lines[key] = (offset, len(line))
            offset += len(line)
        # Not all of them are, where a kill came while they were taken over.
        for key, record in records:
            if key not in self._lines:
                self._append(key, record)
        missing = [task for task in self._tasks if task.key not in self._lines]
        self.output_was_whole = bool(records) and not kept and not missing
        return missing

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            if not self._lines:
                self.path.unlink(missing_ok=True)

    def keep(self, task: Task, drawn: Sequence[Drawn]) -> None:
        """Writes one prompt's completions, on disk when this returns as far as a kill of the process goes."""
        prompt = task.prompt
        identity = {name: value for name, value in (("id", prompt.id), ("source", prompt.source)) if value is not None}
        seeds = [one.seed for one in drawn]
        record = {
            **identity,
            "prompt": list(prompt.prompt),
            "completions": [list(one.completion) for one in drawn],
            "finish_reasons": [one.finish_reason for one in drawn],
            **({} if None in seeds else {"seeds": seeds}),
            "model": self._model,
            "sampling": self._sampling.as_record(),
        }
        self._append(task.key, record)

    def records(self) -> Iterator[dict[str, Any]]:
        """All that there is, in the order of the prompts."""
        assert self._file is not None
        for task in self._tasks:
            if (place := self._lines.get(task.key)) is not None:
                self._file.seek(place[0])
                record = json.loads(self._file.read(place[1]))
                del record["key"]
                yield record

    def completions(self) -> dict[str, Sequence[Messages]]:
        """All that there is, by the tasks' keys."""
        there = [task for task in self._tasks if task.key in self._lines]
        return {task.key: one["completions"] for task, one in zip(there, self.records(), strict=True)}

    def finish(self, records: Iterable[Mapping[str, Any]]) -> int:
        """Writes the output, which appears only when whole, and drops the draft. Returns how many records it has."""
        count = write_records(self._output, records)
        self.discard()
        return count

    def discard(self) -> None:
        """Leaves nothing behind."""
        self._lines.clear()

    def _append(self, key: str, record: Mapping[str, Any]) -> None:
        assert self._file is not None
        line = (json.dumps({"key": key, **record}, ensure_ascii=False) + "\n").encode()
        offset = self._file.seek(0, 2)
        self._file.write(line)
        self._file.flush()
        self._lines[key] = (offset, len(line))

    def _whole_lines(self) -> Iterator[tuple[str, bytes]]:
        known = {task.key for task in self._tasks}
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                place = f"{self.path}:{number}"
                try:
                    record = json.loads(line)
                    parse_completions(record)
                    key = str(record["key"])
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{place}: not what this command writes ({error}); delete the file") from error
                self._require_asked(place, key, known)
                self._check(place, record)
                yield key, line

    def _recorded(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """The output of an earlier run, which has no keys."""
        known = {task.key for task in self._tasks}
        seen: Counter[str] = Counter()
        for place, record in located_records([path], _checked_record):
            of_prompt = prompt_key(parse_prompt(record).prompt)
            key = f"{of_prompt}/{seen[of_prompt]}"
            seen[of_prompt] += 1
            self._require_asked(place, key, known)
            self._check(place, record)
            yield key, record

    def _require_asked(self, place: str, key: str, known: Collection[str]) -> None:
        if key not in known:
            raise DataError(f"{place}: holds a prompt that is not asked for: choose another file to write")

    def _check(self, place: str, record: Mapping[str, Any]) -> None:
        for member, now in (("model", self._model), ("sampling", self._sampling.as_record())):
            if record.get(member) != now:
                raise DataError(
                    f"{place}: was drawn with another {member}, {json.dumps(record.get(member))} instead of "
                    f"{json.dumps(now)}: choose another file to write, or delete this one"
                )


def _checked_record(record: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(record.get("completions"), list):
        raise RecordError("completions", "is missing")
    parse_completions(record)
    return dict(record)
