"""A model to be compared, as a user names it: a server, a model to load, or completions that were drawn already."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from feedback.jsonl import DataError, located_records
from feedback.records import Messages, Prompt, parse_completions
from training.sampling import Draft, Failure, Sampling, Task, prompt_key, tasks_of
from winnow.commands import drawing
from winnow.console import FAILED, CommandError
from winnow.generation import Origin, Pace, origin_of

_RECORDED = (".jsonl", ".gz", ".parquet")


@dataclass(frozen=True, slots=True)
class Contestant:
    """One of the two. `name` is as the user wrote it."""

    name: str
    flag: str
    recorded: Path | None = None
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Drawing:
    """How completions are drawn where they are not recorded."""

    sampling: Sampling
    pace: Pace
    max_failures_in_a_row: int
    keep: Path | None
    """Folder for what is drawn, so that a killed comparison goes on."""


def contestant(name: str, flag: str, defaults: Origin, key_variable: str) -> Contestant:
    """Of a server (`http://host/v1#MODEL`), a file of records, or what a local model is called."""
    if name.endswith(_RECORDED) and "://" not in name:
        return Contestant(name, flag, recorded=Path(name))
    return Contestant(name, flag, origin=origin_of(name, defaults, key_variable))


def recorded_prompts(path: Path) -> list[Task]:
    """The prompts of a file of completions. Raises `DataError`."""
    return tasks_of(
        (place, Prompt(one.prompt, one.id, one.source)) for place, one in located_records([path], parse_completions)
    )


def completions_by_key(one: Contestant, tasks: Sequence[Task], drawing_: Drawing) -> dict[str, Sequence[Messages]]:
    """What the contestant says to each prompt, by the task's key; prompts that failed are told of and not there.

    Raises `CommandError`, `DataError`.
    """
    if one.recorded is not None:
        return _recorded(one, tasks)
    assert one.origin is not None
    with ExitStack() as stack:
        folder = drawing_.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        target = folder / f"{one.flag.strip('-')}.jsonl"
        draft = stack.enter_context(Draft(target, tasks, drawing_.sampling))
        outcome = drawing.draw(
            one.origin,
            drawing_.sampling,
            drawing_.pace,
            draft.begin,
            draft.keep,
            max_failures_in_a_row=drawing_.max_failures_in_a_row,
            label=one.flag,
        )
        drawing.show_failures(outcome)
        if outcome.not_asked:
            way_out = f"; what came is in {draft.path}" if drawing_.keep else ""
            raise CommandError(f"{one.flag} {one.name}: {_last(outcome.failures)}{way_out}", FAILED)
        found = draft.completions()
        if not outcome.failures:
            draft.finish(draft.records())
    return found


def _last(failures: Sequence[Failure]) -> str:
    return f"{len(failures)} prompts failed, the last with: {failures[-1].problem}"


def _recorded(one: Contestant, tasks: Sequence[Task]) -> dict[str, Sequence[Messages]]:
    path = one.recorded
    assert path is not None
    seen: Counter[str] = Counter()
    found: dict[str, Sequence[Messages]] = {}
    for _, record in located_records([path], parse_completions):
        of_prompt = prompt_key(record.prompt)
        found[f"{of_prompt}/{seen[of_prompt]}"] = record.completions
        seen[of_prompt] += 1
    missing = [task.place for task in tasks if task.key not in found]
    if missing:
        raise DataError(
            f"{one.flag} {path}: has no completions for {len(missing)} of the {len(tasks)} prompts, the first of them "
            f"{missing[0]}"
        )
    return {task.key: found[task.key] for task in tasks}
