"""Reading and writing records: JSON lines, gzipped JSON lines and Parquet alike.

A bad record stops the reader with file, line and field; or, asked to, is counted and passed over.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, cast

from feedback.records import RecordError

RecordT = TypeVar("RecordT")


class DataError(ValueError):
    """A file cannot be read or holds a bad record. The message starts with file:line where there is one."""


@dataclass(slots=True)
class Skipped:
    """What `skip_invalid` passed over: the number, and the first few problems as file:line: field: problem."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        """Counts one."""
        self.count += 1
        if len(self.examples) < 5:
            self.examples.append(problem)


def read_records(
    paths: Sequence[Path], parse: Callable[[Mapping[str, Any]], RecordT], skipped: Skipped | None = None
) -> Iterator[RecordT]:
    """Every record of every file, parsed by one of `records.parse_*`.

    With `skipped`, bad records are counted there; without it the first raises `DataError`.
    """
    return (record for _, record in located_records(paths, parse, skipped))


def located_records(
    paths: Sequence[Path], parse: Callable[[Mapping[str, Any]], RecordT], skipped: Skipped | None = None
) -> Iterator[tuple[str, RecordT]]:
    """As `read_records`, each record with its place, `file:line`: for what is found out about it later."""
    for path in paths:
        for line, record in _objects(path):
            try:
                if isinstance(record, json.JSONDecodeError):
                    raise RecordError(f"column {record.colno}", record.msg)
                if isinstance(record, Exception):
                    # Numbers or nesting past what Python's parser takes.
                    raise RecordError("record", f"cannot be decoded: {record}")
                if not isinstance(record, Mapping):
                    raise RecordError("record", "must be a JSON object")
                yield f"{path}:{line}", parse(record)
            except RecordError as error:
                problem = f"{path}:{line}: {error}"
                if skipped is None:
                    raise DataError(problem) from error
                skipped.add(problem)


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Writes JSON lines (gzipped for `.gz`) and returns how many. The file appears only when whole.

    Raises `DataError` for a name that `read_records` would take for another format.
    """
    if path.suffix == ".parquet":
        raise DataError(f"{path}: records are written as JSON lines: name the file .jsonl or .jsonl.gz")
    count = 0
    with replacing(path) as partial, _open_text(partial, "wt", gzipped=path.suffix == ".gz") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place on success and vanishes on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _objects(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, decoded value); a line that is no JSON comes as its error."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), start=1)
        return
    try:
        with _open_text(path, "rt", gzipped=path.suffix == ".gz") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path}: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'winnow[training]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield _without_nulls(row)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: {error}") from error


def _without_nulls(value: Any) -> Any:
    """Parquet fills members that a record did not have with nulls; JSON lines leave them out."""
    if isinstance(value, dict):
        return {key: _without_nulls(member) for key, member in value.items() if member is not None}
    if isinstance(value, list):
        return [_without_nulls(member) for member in value]
    return value


def _open_text(path: Path, mode: Literal["rt", "wt"], *, gzipped: bool) -> IO[str]:
    if gzipped:
        return cast(IO[str], gzip.open(path, mode, encoding="utf-8"))  # the caller closes it
    return path.open(mode, encoding="utf-8")
