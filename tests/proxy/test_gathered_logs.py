"""Lines of requests wait a moment and are written together; a warning waits for nothing, and nothing is lost."""

from __future__ import annotations

import io
import logging

import pytest

from proxy.logs import GatheringHandler, TextFormatter


def record(message: str, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("proxy.access", level, __file__, 0, message, (), None)


async def test_lines_wait_and_are_written_together() -> None:
    stream = io.StringIO()
    handler = GatheringHandler(stream)
    for message in ("one", "two"):
        handler.handle(record(message))
    assert stream.getvalue() == ""
    handler.flush()
    assert stream.getvalue() == "one\ntwo\n"
    handler.close()


async def test_a_warning_takes_all_that_waits_with_it() -> None:
    stream = io.StringIO()
    handler = GatheringHandler(stream)
    handler.handle(record("one"))
    handler.handle(record("two", logging.WARNING))
    assert stream.getvalue() == "one\ntwo\n"
    handler.close()


async def test_a_flood_is_written_before_it_fills_the_memory() -> None:
    stream = io.StringIO()
    handler = GatheringHandler(stream)
    for number in range(1500):
        handler.handle(record(str(number)))
    assert stream.getvalue().count("\n") == 1000
    handler.close()


async def test_a_record_that_cannot_be_formatted_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # else Python prints what was wrong with it
    stream = io.StringIO()
    handler = GatheringHandler(stream)
    broken = logging.LogRecord("elsewhere", logging.WARNING, __file__, 0, "%d", ("x",), None)
    handler.handle(record("one"))
    handler.handle(broken)
    handler.handle(record("two", logging.WARNING))
    assert stream.getvalue() == "one\ntwo\n"
    handler.close()


async def test_a_handler_that_is_replaced_loses_nothing() -> None:
    stream = io.StringIO()
    handler = GatheringHandler(stream)
    handler.handle(record("one"))
    handler.close()
    assert stream.getvalue() == "one\n"


def test_outside_the_event_loop_nothing_waits() -> None:
    stream = io.StringIO()
    handler = GatheringHandler(stream)
    handler.handle(record("one"))
    assert stream.getvalue() == "one\n"
    handler.close()


def test_a_message_that_quotes_a_line_break_stays_one_line() -> None:
    (line,) = TextFormatter().format(record("it said: x\n2026-01-01T00:00:00Z INFO    request\x1b[2J ü")).splitlines()
    assert line.endswith(r"it said: x\n2026-01-01T00:00:00Z INFO    request\x1b[2J ü")
