"""How commands speak: tables for people, `--json` for machines, errors in one line, exit codes.

0 only on success, 2 for bad usage or bad input, 1 when the work itself failed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

BAD_INPUT = 2
FAILED = 1


class CommandError(Exception):
    """Ends a command. The message is one line that says what is wrong, where, and the way out."""

    def __init__(self, message: str, exit_code: int = BAD_INPUT) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def fail(message: str, exit_code: int = BAD_INPUT) -> NoReturn:
    """One line on stderr, then out."""
    line = " ".join(message.split())
    print(f"winnow: {line}", file=sys.stderr)  # noqa: T201
    raise SystemExit(exit_code)


@contextmanager
def exits() -> Iterator[None]:
    """Turns what a person can mend into one line and an exit code. Bugs keep their traceback."""
    try:
        yield
    except CommandError as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def out() -> Console:
    """Standard output. Wide where it is no terminal, so that a table is not cut to 80 columns in a pipe."""
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def progress_console() -> Console:
    """Standard error: spinners and progress never mix with results."""
    return Console(stderr=True, highlight=False)


def say(text: str, style: str | None = None) -> None:
    """A line on standard error, in one piece however long: paths and commands in it are there to be copied."""
    progress_console().print(text, markup=False, soft_wrap=True, style=style)


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False))  # noqa: T201


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> Table:
    """Numbers to the right, texts to the left; cells are plain text, markup in them means nothing."""
    numeric = [bool(rows) and all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(columns))]
    built = Table(title=title, title_justify="left")
    for name, is_number in zip(columns, numeric, strict=True):
        built.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        built.add_row(*(Text(_cell(value)) for value in row))
    return built


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
