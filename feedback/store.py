"""The feedback store on a database: SQLite in a file by default, PostgreSQL by URL. The protocol is in `judgements`."""

from __future__ import annotations

import contextlib
import sqlite3
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, SQLAlchemyError, StatementError
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random

from feedback.judgements import (
    CandidateSet,
    Judgement,
    RefusedError,
    StoredCandidate,
    StoredJudgement,
    StoreError,
)
from feedback.migrations import NewerSchemaError, candidate_sets, candidates, feedback, migrate

_BUSY_TIMEOUT_MS = 5000
"""How long SQLite waits for another process's write."""
_CONNECT_TIMEOUT_S = 5
_STATEMENT_TIMEOUT_MS = 15_000
_WRITES = "winnow_writes"
_BATCH_ROWS = 200
"""Sets read at once when all are wanted."""
_FIELDS = ("rating", "preferred", "ranking", "correction", "labels", "comment", "annotator")


class DatabaseStore:
    """A `FeedbackStore`. Raises `ValueError` for a URL that names no database it knows."""

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self._writing = self._engine.execution_options(**{_WRITES: True})

    def open(self) -> None:
        if self._engine.dialect.name == "sqlite":
            _make_private(Path(str(self._engine.url.database)))
        with self._write() as connection:
            migrate(connection)

    def add_sets(self, sets: Sequence[CandidateSet]) -> None:
        with self._write() as connection:
            for one in sets:
                _insert_set(connection, one)

    def candidate_set(self, completion_id: str) -> CandidateSet | None:
        with self._read() as connection:
            found = _load_sets(connection, [completion_id])
        return found[0] if found else None

    def add_judgement(self, judgement: Judgement, unwritten: CandidateSet | None = None) -> StoredJudgement:
        fingerprint = judgement.fingerprint()
        stored = StoredJudgement(f"fb-{uuid.uuid4().hex}", time.time(), judgement)
        row = {name: getattr(judgement, name) for name in _FIELDS} | {
            "id": stored.id,
            "created": stored.created,
            "completion_id": judgement.completion_id,
            "fingerprint": fingerprint,
        }
        with self._write() as connection:
            if unwritten is not None:
                _insert_set(connection, unwritten)
            if _insert_new(connection, feedback, row):
                return stored
            before = connection.execute(sa.select(feedback).where(feedback.c.fingerprint == fingerprint)).one()
            return StoredJudgement(before.id, before.created, judgement, repeated=True)

    def judged_sets(self) -> Iterator[tuple[CandidateSet, Sequence[StoredJudgement]]]:
        with self._read() as connection:
            first = sa.func.min(feedback.c.created)
            query = sa.select(feedback.c.completion_id).group_by(feedback.c.completion_id)
            ids = connection.scalars(query.order_by(first, feedback.c.completion_id)).all()
        for start in range(0, len(ids), _BATCH_ROWS):
            batch = ids[start : start + _BATCH_ROWS]
            with self._read() as connection:
                sets = {one.completion_id: one for one in _load_sets(connection, batch)}
                said = _load_judgements(connection, batch)
            for completion_id in batch:
                yield sets[completion_id], said[completion_id]

    def close(self) -> None:
        self._engine.dispose()

    @contextlib.contextmanager
    def _write(self) -> Iterator[Connection]:
        with _mapped(), self._writing.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _read(self) -> Iterator[Connection]:
        with _mapped(), self._engine.connect() as connection:
            yield connection


def _engine(url: str) -> Engine:
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise ValueError("feedback.database is no database URL, such as sqlite:///winnow.db") from error
    kind = parsed.get_backend_name()
    # Parameters are people's words: they must not turn up in error messages.
    if kind == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise ValueError("feedback.database names no file: sqlite:///winnow.db does")
        engine = sa.create_engine(parsed.set(drivername="sqlite+pysqlite"), hide_parameters=True)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    if kind == "postgresql":
        try:
            return sa.create_engine(
                parsed.set(drivername="postgresql+psycopg"),
                hide_parameters=True,
                pool_pre_ping=True,
                connect_args={
                    "connect_timeout": _CONNECT_TIMEOUT_S,
                    "options": parsed.query.get("options", f"-c statement_timeout={_STATEMENT_TIMEOUT_MS}"),
                },
            )
        except ImportError as error:
            raise ValueError("feedback.database: PostgreSQL needs its driver: install winnow[postgres]") from error
    raise ValueError(f"feedback.database: {kind} is not known; sqlite:///FILE and postgresql://… are")


def _make_private(file: Path) -> None:
    """It holds what people wrote: only its owner reads a new one. SQLite gives its other files the same mode."""
    try:
        file.touch(mode=0o600)
    except OSError as error:
        raise StoreError(f"the feedback store failed: {file}: {error.strerror}") from error


def _prepare_sqlite(connection: Any, _: object) -> None:
    # Python's driver would begin transactions by itself, but not before every statement: `_begin_sqlite` does it.
    connection.isolation_level = None
    # FULL: what was acknowledged survives the loss of power, and costs nothing measurable beside WAL's own writes.
    for pragma in (f"busy_timeout = {_BUSY_TIMEOUT_MS}", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")
    # Where two open a new file at once, the switch to WAL fails at once for one of them: it heeds no busy_timeout.
    switching = Retrying(
        retry=retry_if_exception(_is_busy),
        stop=stop_after_delay(_BUSY_TIMEOUT_MS / 1000),
        wait=wait_random(0.005, 0.05),
        reraise=True,
    )
    switching(connection.execute, "PRAGMA journal_mode = WAL")


def _is_busy(error: BaseException) -> bool:
    return isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_BUSY


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later would fail at once where another one wrote in between.
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        first_line = next(iter(str(cause).splitlines()), "")
        kind = RefusedError if _is_refusal(error) else StoreError
        raise kind(f"the feedback store failed: {type(cause).__name__}: {first_line}") from error
    except NewerSchemaError as error:
        raise StoreError(str(error)) from error


def _is_refusal(error: SQLAlchemyError) -> bool:
    """The data's own fault: of a kind or size that is not taken. Not a database that is away, busy or full."""
    if isinstance(error, DBAPIError):
        return isinstance(error, DataError | IntegrityError)
    return isinstance(error, StatementError)


def _insert_new(connection: Connection, table: sa.Table, row: dict[str, Any]) -> bool:
    """False where a row with the same key is there; that one stays as it is."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    key = table.primary_key.columns.values()[0]
    inserted = insert(table).values(row).on_conflict_do_nothing().returning(key)
    return connection.execute(inserted).first() is not None


def _insert_set(connection: Connection, one: CandidateSet) -> None:
    row = {column.name: getattr(one, column.name) for column in candidate_sets.columns}
    if _insert_new(connection, candidate_sets, row) and one.candidates:
        rows = [asdict(candidate) | {"completion_id": one.completion_id} for candidate in one.candidates]
        connection.execute(candidates.insert(), [row | {"idx": row.pop("index")} for row in rows])


def _load_sets(connection: Connection, ids: Sequence[str]) -> list[CandidateSet]:
    order = (candidates.c.completion_id, candidates.c.idx)
    rows = connection.execute(sa.select(candidates).where(candidates.c.completion_id.in_(ids)).order_by(*order))
    drawn: dict[str, list[StoredCandidate]] = {}
    for row in rows.mappings():
        fields = {name: value for name, value in row.items() if name not in ("completion_id", "idx")}
        drawn.setdefault(row["completion_id"], []).append(StoredCandidate(index=row["idx"], **fields))
    found = connection.execute(sa.select(candidate_sets).where(candidate_sets.c.completion_id.in_(ids)))
    return [CandidateSet(candidates=drawn.get(row["completion_id"], []), **row) for row in found.mappings()]


def _load_judgements(connection: Connection, ids: Sequence[str]) -> dict[str, list[StoredJudgement]]:
    query = sa.select(feedback).where(feedback.c.completion_id.in_(ids)).order_by(feedback.c.created, feedback.c.id)
    said: dict[str, list[StoredJudgement]] = {}
    for row in connection.execute(query).mappings():
        judgement = Judgement(row["completion_id"], **{name: row[name] for name in _FIELDS})
        said.setdefault(row["completion_id"], []).append(StoredJudgement(row["id"], row["created"], judgement))
    return said
