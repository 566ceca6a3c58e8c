"""What the server writes to standard error: a line a request, and warnings. JSON, or text for people.

Never a body, a header or a key. Other packages' loggers stay at warnings, whatever `log.level` says: some print whole
requests, credentials included, when asked to debug.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from datetime import UTC, datetime
from typing import IO, Any

import orjson

from proxy.config_operations import LogSettings
from proxy.facts import Facts

ACCESS = "proxy.access"
_OURS = ("proxy", "reward", "feedback", "winnow")
_FIELDS = "winnow_fields"
_TEXT_CHARS = 200
"""Of what clients wrote, such as a model's name."""

_GATHER_S = 0.05
_MAX_WAITING = 1000

_access = logging.getLogger(ACCESS)


def configure_logging(settings: LogSettings, stream: IO[str] | None = None) -> None:
    """For the front door: replaces the process's log handlers by one that writes to `stream`, or standard error."""
    handler = GatheringHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.format == "json" else TextFormatter())
    # What no line of ours shows is not looked up for every record.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in _OURS:
        logging.getLogger(name).setLevel(settings.level.upper())


def log_request(facts: Facts, status: int, elapsed_s: float) -> None:
    """One line. Probes and scrapes are for debugging only: there are thousands of them."""
    level = logging.DEBUG if facts.endpoint == "operations" and status < 400 else logging.INFO
    if _access.isEnabledFor(level):
        # Not `log`: it would look up the caller, who is the same every time and whom no line names.
        record = logging.LogRecord(ACCESS, level, __file__, 0, "request", (), None)
        # Made now: the facts hold on to whole answers, which must not wait for a line to be written.
        setattr(record, _FIELDS, _request_fields(facts, status, elapsed_s))
        _access.handle(record)


def _request_fields(facts: Facts, status: int, elapsed_s: float) -> dict[str, Any]:
    bill = facts.bill
    fields = {
        "request_id": facts.request_id,
        "endpoint": facts.endpoint,
        "route": facts.route,
        "status": status,
        "duration_ms": round(elapsed_s * 1000, 1),
        "overhead_ms": None if facts.overhead_s is None else round(facts.overhead_s * 1000, 1),
        "key": facts.key,
        "model": facts.model[:_TEXT_CHARS] if facts.model is not None else None,
        "stream": facts.stream,
        "best_of": facts.best_of,
        "upstream_calls": facts.num_calls,
        "candidates": facts.candidates,
        "reward": facts.reward,
        "accepted": facts.accepted,
        "prompt_tokens": bill.tokens.prompt if bill is not None else None,
        "completion_tokens": bill.tokens.completion if bill is not None else None,
        "tokens_estimated": bill.tokens.estimated if bill is not None else None,
        "cost": bill.cost if bill is not None else None,
        "completion_id": facts.completion_id,
        "error": facts.error,
    }
    return {name: value for name, value in fields.items() if value is not None}


class GatheringHandler(logging.StreamHandler[IO[str]]):
    """Writes what is logged inside the event loop a moment later, many lines at once.

    Formatted and written one by one, the lines of requests are a sixth of what a plain request costs. Whatever is
    worth a warning, or comes from outside the loop, is written at once, with all that waits.
    """

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(stream)
        self._waiting: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Called with the handler's lock held."""
        self._waiting.append(record)
        if record.levelno >= logging.WARNING or len(self._waiting) >= _MAX_WAITING:
            self.flush()
        elif len(self._waiting) == 1:
            # Whoever begins the gathering sees to its end.
            try:
                asyncio.get_running_loop().call_later(_GATHER_S, self.flush)
            except RuntimeError:
                self.flush()

    def flush(self) -> None:
        self.acquire()
        try:
            records, self._waiting = self._waiting, []
            if records:
                self._write(records)
            super().flush()
        finally:
            self.release()

    def close(self) -> None:
        """New settings replace the handler while lines may be waiting."""
        self.flush()
        super().close()

    def _write(self, records: list[logging.LogRecord]) -> None:
        try:
            self.stream.write("".join(map(self._line, records)))
        except Exception:
            self.handleError(records[-1])

    def _line(self, record: logging.LogRecord) -> str:
        """Empty for a record that cannot be formatted: it must not cost the others."""
        try:
            return f"{self.format(record)}\n"
        except Exception:
            self.handleError(record)
            return ""


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        } | _fields_of(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # A lone surrogate, which only Python strings can hold, must not cost the line.
        return _dumped(line)


class TextFormatter(logging.Formatter):
    """Time, level, message, then `name=value`."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        fields = "".join(f" {name}={_value(value)}" for name, value in _fields_of(record).items())
        line = f"{time} {record.levelname:<7} {_on_one_line(record.getMessage())}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, _FIELDS, {})
    return fields


def _on_one_line(message: str) -> str:
    """Messages may quote a service, and that one a client, whose line breaks must not look like ours."""
    if message.isprintable():
        return message
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in message)


def _value(value: object) -> str:
    if not isinstance(value, str):
        return str(value)
    return value if value.isprintable() and " " not in value and '"' not in value else _dumped(value)


def _dumped(value: object) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        return orjson.dumps(repr(value)).decode()
