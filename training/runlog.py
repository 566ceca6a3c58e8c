"""What a run tells: a progress bar on a terminal, JSON lines and TensorBoard on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from feedback.jsonl import replacing

LOG_NAME = "log.jsonl"
SAMPLES_NAME = "samples.jsonl"


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with what the policy made of it."""

    prompt: str
    completion: str
    reward: float | None = None
    """Where there is something that rewards."""


class RunLog:
    """Metrics of one run. On other processes than the main one it does nothing. Use as a context manager."""

    def __init__(self, folder: Path, *, active: bool, resumed_step: int = 0) -> None:
        """`resumed_step`: the checkpoint a run goes on from; what was logged after it is dropped, to be done again."""
        self._active = active
        self._resumed_step = resumed_step
        self._folder = folder
        self._file: Any = None
        self._samples: Any = None
        self._writer: Any = None
        # On stderr: stdout is for results.
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not (active and console.is_terminal),
        )

    def __enter__(self) -> Self:
        if self._active:
            from torch.utils.tensorboard import SummaryWriter

            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = self._opened(LOG_NAME)
            self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._resumed_step + 1)
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._active:
            self._file.close()
            if self._samples is not None:
                self._samples.close()
            self._writer.close()

    def _opened(self, name: str) -> TextIO:
        path = self._folder / name
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            # Whole on disk before a line is added: a kill now must not take what an earlier one left.
            with replacing(path) as partial:
                partial.write_text("".join(filter(self._is_kept, lines)), encoding="utf-8")
        return path.open("a", encoding="utf-8")

    def _is_kept(self, line: str) -> bool:
        # A line cut off by a kill has no end.
        return line.endswith("\n") and bool(json.loads(line)["step"] <= self._resumed_step > 0)

    def task(self, description: str, total: int, completed: int = 0) -> Bar:
        """A bar of its own."""
        return Bar(self._progress, self._progress.add_task(description, total=total, completed=completed, note=""))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One line of numbers for a step."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Texts to look at, in a file of their own."""
        if not self._active:
            return
        if self._samples is None:
            self._samples = self._opened(SAMPLES_NAME)
        for sample in samples:
            self._samples.write(json.dumps({"step": step, **asdict(sample)}, ensure_ascii=False) + "\n")
        self._samples.flush()
        for number, sample in enumerate(samples):
            self._writer.add_text(f"sample_{number}", f"{sample.prompt}\n\n→ {sample.completion}", step)

    def note(self, text: str) -> None:
        """A line above the bars."""
        if self._active:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Bar:
    """One line of progress."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress = progress
        self._task = task

    def advance(self, count: int = 1, note: str = "") -> None:
        """Moves on; `note` stands at the end of the line."""
        if note:
            self._progress.update(self._task, note=note)
        self._progress.advance(self._task, count)
