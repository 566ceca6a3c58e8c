"""What the tests of `/v1/responses` ask for, and how they read what comes back."""

from __future__ import annotations

from typing import Any

from tests.conftest import RunningProxy
from tests.fakes.upstream import Reply

TEXTS = ("bad", "good good", "so so", "good")
SCHEMA = {
    "type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False
}  # fmt: skip
TOOL = {"type": "function", "name": "look", "parameters": SCHEMA, "strict": True}


def graded(proxy: RunningProxy) -> RunningProxy:
    """Its upstream answers with texts of different reward."""
    proxy.upstream.script = lambda received: Reply(texts=TEXTS)
    return proxy


def ask(proxy: RunningProxy, **kwargs: Any) -> Any:
    return proxy.client.responses.with_raw_response.create(**({"model": "m", "input": "Say something."} | kwargs))


def call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": function}]}
    return {"message": message, "finish_reason": "tool_calls"}


def bodies(proxy: RunningProxy) -> list[dict[str, Any]]:
    return [received.body for received in proxy.upstream.received]


def final(raw: Any) -> Any:
    return list(raw.parse())[-1].response


def text_of(raw: Any, stream: bool) -> str:
    return str((final(raw) if stream else raw.parse()).output_text)
