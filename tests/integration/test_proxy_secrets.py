"""Canaries: keys and people's words, sent every way there is, and looked for everywhere an operator might."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from proxy.config_operations import LogSettings
from proxy.logs import configure_logging
from tests.conftest import RunningProxy, StartProxy
from tests.fakes.upstream import Received, Reply

CLIENT_KEY = "sk-canary-client-0123456789abcdef"
UPSTREAM_KEY = "sk-canary-upstream-0123456789abcdef"
WORDS = "canary-words"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that the process logs, at the most talkative level there is."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    configure_logging(LogSettings(format="json", level="debug"), stream)
    yield stream
    logging.basicConfig(level=level, handlers=handlers or None, force=True)
    for name in ("proxy", "reward", "feedback", "winnow"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture
def proxy(start_proxy: StartProxy, tmp_path: Path, log: io.StringIO) -> RunningProxy:
    return start_proxy(
        server={"api_keys": [CLIENT_KEY]},
        upstream={"key": UPSTREAM_KEY},
        route={"log_candidates": True},
        feedback={"database": f"sqlite:///{tmp_path / 'feedback.db'}"},
    )


def written(stream: io.StringIO) -> str:
    """Lines of requests are gathered for a moment."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    return stream.getvalue()


def quote_everything(received: Received) -> Reply:
    """An upstream that answers with the key it was given, as some do, in every shape of an error."""
    key = received.headers["authorization"]
    bodies = [
        {"error": {"message": f"Incorrect API key provided: {key}", "type": "t", "param": None, "code": key}},
        {"detail": f"bad {key}"},
        {"error": f"bad {key}"},
    ]
    statuses = (401, 400, 500)
    return Reply(status=statuses[received.number % 3], raw=json.dumps(bodies[received.number % 3]).encode())


def test_no_canary_anywhere(proxy: RunningProxy, log: io.StringIO, tmp_path: Path) -> None:
    answers: list[str] = []
    messages = [{"role": "user", "content": f"{WORDS} my key is {CLIENT_KEY}"}]

    def ask(key: str = CLIENT_KEY, path: str = "chat/completions", **fields: object) -> None:
        body = {"model": "m", "messages": messages, "prompt": WORDS, "input": WORDS} | fields
        answer = httpx2.post(
            f"{proxy.url}/v1/{path}", json=body, headers={"authorization": f"Bearer {key}"}, timeout=30
        )
        answers.append(answer.text + str(answer.headers))

    for path in ("chat/completions", "completions", "responses"):
        ask(path=path, stream=False)
        ask(path=path, stream=True)
    ask(key=f"{CLIENT_KEY}-wrong")
    proxy.upstream.script = quote_everything
    for _ in range(3):
        for fields in ({}, {"stream": True}, {"best_of": 1}, {"best_of": 1, "stream": True}):
            ask(**fields)
    proxy.upstream.script = lambda received: Reply(raw=b"{", cut_after=0)
    ask()
    ask(stream="yes")
    with pytest.raises(openai.APIStatusError) as caught:
        proxy.client.with_options(api_key=CLIENT_KEY).chat.completions.create(model="m", messages=messages)  # type: ignore[arg-type]
    answers.append(str(caught.value))
    for page in ("metrics", "docs", "openapi.json", "healthz", "readyz"):
        answers.append(httpx2.get(f"{proxy.url}/{page}").text)
    lines = written(log)
    assert lines.count('"message":"request"') >= 20, "the requests were logged"
    everything = "\n".join(answers)
    for where, text in (("answers", everything), ("log", lines)):
        assert CLIENT_KEY not in text, where
        assert UPSTREAM_KEY not in text, where
    assert WORDS not in lines
    for file in tmp_path.iterdir():
        stored = file.read_bytes()
        assert CLIENT_KEY.encode() not in stored and UPSTREAM_KEY.encode() not in stored


def test_an_answer_of_a_length_told_beforehand_keeps_it(proxy: RunningProxy) -> None:
    sent = json.dumps({"key": UPSTREAM_KEY}).encode()
    answer = httpx2.post(f"{proxy.url}/v1/echo", content=sent, headers={"authorization": f"Bearer {CLIENT_KEY}"})
    assert int(answer.headers["content-length"]) == len(answer.content) == len(sent)
    assert answer.json()["key"].strip("*") == "[redacted]"


def test_a_line_says_what_an_operator_asks(proxy: RunningProxy, log: io.StringIO) -> None:
    headers = {"authorization": f"Bearer {CLIENT_KEY}", "x-request-id": "mine-1"}
    body = {"model": 'm"\n', "messages": [{"role": "user", "content": WORDS}]}
    answer = httpx2.post(f"{proxy.url}/v1/chat/completions", json=body, headers=headers, timeout=30)
    lines = [json.loads(line) for line in written(log).splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "mine-1"]
    assert line["completion_id"] == answer.headers["x-winnow-completion-id"]
    assert (line["endpoint"], line["route"], line["status"], line["best_of"]) == ("chat", "default", 200, 4)
    assert line["candidates"] == "s=4;f=0;i=0" and line["upstream_calls"] == 1
    assert (line["prompt_tokens"], line["completion_tokens"], line["tokens_estimated"]) == (7, 8, False)
    assert line["model"] == 'm"\n' and line["duration_ms"] >= line["overhead_ms"] >= 0


def test_text_lines_cannot_be_forged() -> None:
    stream = io.StringIO()
    handlers = list(logging.getLogger().handlers)
    configure_logging(LogSettings(format="text", level="info"), stream)
    fields = {"winnow_fields": {"model": "m\n2026-01-01T00:00:00Z ERROR forged", "status": 200}}
    logging.getLogger("proxy.access").info("request", extra=fields)
    logging.basicConfig(level=logging.WARNING, handlers=handlers or None, force=True)
    logging.getLogger("proxy").setLevel(logging.NOTSET)
    (line,) = written(stream).splitlines()
    assert line.endswith('INFO    request model="m\\n2026-01-01T00:00:00Z ERROR forged" status=200')
