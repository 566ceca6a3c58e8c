"""An OpenAI-shaped server over real HTTP, with scripted faults.

Set `FakeUpstream.script` to a function from a received request to a `Reply`; without one it answers well.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.responses import ResponseStore, response_events, response_object

_WAIT_S = 20


@dataclass(frozen=True)
class Received:
    number: int
    """Order of arrival, from 0, over all requests that generate."""
    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    raw: bytes

    @property
    def body(self) -> dict[str, Any]:
        parsed = json.loads(self.raw)
        assert isinstance(parsed, dict)
        return parsed


@dataclass(frozen=True)
class Reply:
    """One scripted answer. `texts` are the choices; one is picked by the request's number where `n` is not honoured."""

    texts: Sequence[str] = ("an answer",)
    choice: Mapping[str, Any] = field(default_factory=dict)
    """Laid over every choice: `finish_reason`, `message`, `logprobs` …"""
    response: Mapping[str, Any] = field(default_factory=dict)
    """Laid over a response of the Responses API: `status`, `error` …"""
    choices: Sequence[Mapping[str, Any]] = ()
    """Laid over the choices one by one, each beside the text of its place; shorter than `texts`: the rest stay."""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    """The whole body as it is, whatever else is set."""
    honours_n: bool = True
    hold: bool = False
    """Answer only after `release`. A client that leaves first counts as cancelled."""
    cut_after: int | None = None
    """Streamed: cut the connection after this many chunks."""
    hold_after: int | None = None
    """Streamed: hold after this many chunks."""
    tells_usage: bool = True
    """False: a whole answer comes without `usage`."""
    streams: bool = True
    """False: answers JSON to `stream: true`."""


def error_reply(status: int, code: str | None = None, **headers: str) -> Reply:
    body = {"error": {"message": f"scripted {status}", "type": "scripted", "param": "p", "code": code}}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status=status, raw=json.dumps(body).encode(), headers=names)


class FakeUpstream:
    """The ASGI app. Its counters may be read from any thread; `wait_for` waits for a claim about them."""

    def __init__(self) -> None:
        self.script: Callable[[Received], Reply] = lambda received: Reply()
        self.received: list[Received] = []
        self.others: list[Received] = []
        """Requests to paths that generate nothing."""
        self.billed: list[dict[str, Any]] = []
        """The usage of every whole answer, whether or not it was sent along."""
        self.store = ResponseStore()
        self.finished = 0
        self.cancelled = 0
        self._changed = threading.Condition()
        self._released = threading.Event()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._numbers = itertools.count()

    def release(self) -> None:
        """Lets every held answer go, now and later."""
        self._released.set()
        with self._changed:
            waiting = list(self._waiting)
        for loop, event in waiting:
            loop.call_soon_threadsafe(event.set)

    def wait_for(self, claim: Callable[[FakeUpstream], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: claim(self), _WAIT_S), (
                f"received {len(self.received)}, finished {self.finished}, cancelled {self.cancelled}"
            )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        received = await self._take(scope, receive)
        handler = self._generate if self._generates(received.method, received.path) else self._other
        work = asyncio.create_task(handler(received, send))
        left = asyncio.create_task(_disconnect(receive))
        await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
        gone = not work.done()
        work.cancel()
        left.cancel()
        await asyncio.gather(work, left, return_exceptions=True)
        with self._changed:
            self.cancelled += gone
            self.finished += not gone
            self._changed.notify_all()

    async def _take(self, scope: Any, receive: Any) -> Received:
        raw = b""
        more = True
        while more:
            message = await receive()
            raw += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        generates = self._generates(scope["method"], scope["path"])
        with self._changed:
            number = next(self._numbers) if generates else len(self.others)
            received = Received(
                number, scope["method"], scope["raw_path"].decode(), scope["query_string"].decode(), headers, raw
            )
            (self.received if generates else self.others).append(received)
            self._changed.notify_all()
        return received

    async def _hold(self) -> None:
        event = asyncio.Event()
        with self._changed:
            self._waiting.append((asyncio.get_running_loop(), event))
        if not self._released.is_set():
            await event.wait()

    async def _generate(self, received: Received, send: Any) -> None:
        reply = self.script(received)
        if reply.hold:
            await self._hold()
        if reply.raw is not None:
            await _send(send, reply.status, reply.raw, reply.headers)
            return
        choices = _choices(received, reply)
        if received.path == _RESPONSES:
            await self._respond(received, reply, choices[0], send)
            return
        if received.body.get("stream") and reply.streams:
            await self._stream(received, reply, choices, send)
            self.billed.append(_usage(choices))
            return
        answer = _frame(received) | {"choices": choices, "usage": _usage(choices)}
        if not reply.tells_usage:
            del answer["usage"]
        self.billed.append(_usage(choices))
        await _send(send, reply.status, json.dumps(answer).encode(), reply.headers)

    async def _respond(self, received: Received, reply: Reply, choice: dict[str, Any], send: Any) -> None:
        response = response_object(received.number, received.body, choice) | dict(reply.response)
        self.store.keep(received.body, response)
        self.billed.append(_usage([choice]))
        if received.body.get("stream") and reply.streams:
            events = [
                f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in response_events(response)
            ]
            await self._send_events(reply, events, send)
            return
        await _send(send, reply.status, json.dumps(response).encode(), reply.headers)

    async def _stream(self, received: Received, reply: Reply, choices: list[dict[str, Any]], send: Any) -> None:
        chunks = stream_chunks(received, choices)
        events = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
        await self._send_events(reply, [*events, b"data: [DONE]\n\n"], send)

    async def _send_events(self, reply: Reply, events: Sequence[bytes], send: Any) -> None:
        head = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-request-id", b"up-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for position, event in enumerate(events):
            if position == reply.cut_after:
                raise ConnectionError("scripted cut")
            if position == reply.hold_after:
                await self._hold()
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _other(self, received: Received, send: Any) -> None:
        if received.path.startswith(f"{_RESPONSES}/"):
            status, body = self.store.answer(received.method, received.path)
            await _send(send, status, json.dumps(body).encode(), {})
        else:
            await _other(received, send)

    @staticmethod
    def _generates(method: str, path: str) -> bool:
        return method == "POST" and path in ("/v1/chat/completions", "/v1/completions", _RESPONSES)


_RESPONSES = "/v1/responses"


def stream_chunks(received: Received, choices: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The chunks of an answer: a role, a chunk a word, a finish reason, and usage if asked for."""
    wants_usage = (received.body.get("stream_options") or {}).get("include_usage")
    is_chat = "chat" in received.path
    frame = _frame(received) | ({"object": "chat.completion.chunk"} if is_chat else {})
    chunks = []
    for choice in choices:
        index = choice["index"]
        text = choice["message"].get("content") if is_chat else choice["text"]
        words = [word + " " for word in (text or "").split(" ")]
        words[-1] = words[-1][:-1]
        deltas: list[dict[str, Any]] = (
            [{"role": "assistant", "content": ""}, *({"content": word} for word in words)]
            if is_chat
            else [{"text": word} for word in words]
        )
        if is_chat and choice["message"].get("tool_calls"):
            deltas = [{"role": "assistant", "content": None}, *_tool_deltas(choice["message"]["tool_calls"])]
        for delta in deltas:
            inner = {"delta": delta} if is_chat else delta
            chunks.append(frame | {"choices": [{"index": index, **inner, "finish_reason": None}]})
        last = {"delta": {}} if is_chat else {"text": ""}
        chunks.append(frame | {"choices": [{"index": index, **last, "finish_reason": choice["finish_reason"]}]})
    if wants_usage:
        chunks = [chunk | {"usage": None} for chunk in chunks]
        chunks.append(frame | {"choices": [], "usage": _usage(list(choices))})
    return chunks


def _tool_deltas(calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    deltas = []
    for index, call in enumerate(calls):
        arguments = call["function"]["arguments"]
        half = len(arguments) // 2
        function = {"name": call["function"]["name"], "arguments": arguments[:half]}
        first = {"index": index, "id": call["id"], "type": "function", "function": function}
        deltas.append({"tool_calls": [first]})
        deltas.append({"tool_calls": [{"index": index, "function": {"arguments": arguments[half:]}}]})
    return deltas


def _choices(received: Received, reply: Reply) -> list[dict[str, Any]]:
    n = received.body.get("n") or 1
    count = n if reply.honours_n else 1
    # Calls without `n` walk through the texts too, so that parallel calls get different ones.
    places = [(received.number + i if n == 1 else i) % len(reply.texts) for i in range(count)]
    is_chat = received.path != "/v1/completions"
    choices: list[dict[str, Any]] = []
    for index, place in enumerate(places):
        text = reply.texts[place]
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        own = reply.choices[place] if place < len(reply.choices) else {}
        whole = {"index": index, **said, "logprobs": None, "finish_reason": "stop"} | dict(reply.choice) | dict(own)
        choices.append(whole)
    return choices


def _frame(received: Received) -> dict[str, Any]:
    is_chat = "chat" in received.path
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{received.number}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": 1_700_000_000,
        "model": received.body.get("model", "none"),
        "system_fingerprint": "fp_fake",
    }


def _usage(choices: list[dict[str, Any]]) -> dict[str, Any]:
    texts = [choice.get("text") or (choice.get("message") or {}).get("content") or "" for choice in choices]
    completion = sum(len(str(text).split()) for text in texts)
    return {
        "prompt_tokens": 7,
        "completion_tokens": completion,
        "total_tokens": 7 + completion,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def _other(received: Received, send: Any) -> None:
    """Models, embeddings, and an echo for everything else."""
    if received.path == "/v1/models":
        models = [{"id": "fake-model", "object": "model", "created": 1, "owned_by": "fake"}]
        await _send(send, 200, json.dumps({"object": "list", "data": models}).encode(), {})
    elif received.path == "/v1/embeddings":
        vector = {"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}
        usage = {"prompt_tokens": 2, "total_tokens": 2}
        body = {"object": "list", "model": received.body["model"], "data": [vector], "usage": usage}
        await _send(send, 200, json.dumps(body).encode(), {})
    else:
        headers = {"content-type": "application/octet-stream", "set-cookie": "secret=1", "openai-version": "fake"}
        await _send(send, 200, received.raw, headers)


async def _send(send: Any, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    named = {"content-type": "application/json", "content-length": str(len(body)), "x-request-id": "up-plain"}
    head = [
        (name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in (named | dict(headers)).items()
    ]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


async def _disconnect(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _lifespan(receive: Any, send: Any) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
