"""Adding usage up, and the folding of streams, without a network."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from proxy.candidates import Call
from proxy.recording import StreamRecorder
from proxy.response import sum_usage
from proxy.sse import event

USAGES = st.lists(
    st.fixed_dictionaries({"prompt_tokens": st.integers(0, 999), "completion_tokens": st.integers(0, 999)}), max_size=6
)


@given(USAGES, USAGES)
def test_sums_do_not_depend_on_grouping(left: list[dict[str, int]], right: list[dict[str, int]]) -> None:
    parts = [part for part in (sum_usage(left), sum_usage(right)) if part is not None]
    assert sum_usage(parts) == sum_usage([*left, *right])


def test_details_are_summed_and_nulls_bear() -> None:
    total = sum_usage([
        {"prompt_tokens": 1, "details": {"cached": 2}, "cost": 0.5, "tier": "a", "odd": None},
        {"prompt_tokens": 2, "details": {"cached": 3, "audio": 1}, "cost": 0.25, "tier": None, "odd": None},
        {"prompt_tokens": 4, "details": None},
    ])  # fmt: skip
    assert total == {
        "prompt_tokens": 7, "details": {"cached": 5, "audio": 1}, "cost": 0.75, "tier": "a", "odd": None
    }  # fmt: skip
    assert sum_usage([]) is None


async def folded(*chunks: dict[str, Any]) -> dict[str, Any]:
    async def pieces() -> Any:
        for chunk in chunks:
            yield event(orjson.dumps(chunk))
        yield event(b"[DONE]")

    recorder = StreamRecorder("u")
    await recorder.record(pieces())
    return dict(recorder.candidate(0, Call(0.0)).choice)


async def test_deltas_fold_into_a_whole_choice() -> None:
    def delta(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"id": "i", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    choice = await folded(
        delta({"role": "assistant", "content": None}),
        delta({"reasoning_content": "hm"}),
        delta({"reasoning_content": "m"}),
        delta({"content": "a"}),
        delta({"content": "b"}),
        delta(
            {"tool_calls": [{"index": 1, "id": "t1", "type": "function", "function": {"name": "g", "arguments": ""}}]}
        ),
        delta(
            {"tool_calls": [{"index": 0, "id": "t0", "type": "function", "function": {"name": "f", "arguments": "{"}}]}
        ),
        delta({"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}),
        delta({}, "tool_calls"),
    )
    message = choice["message"]
    assert (message["role"], message["content"], message["reasoning_content"]) == ("assistant", "ab", "hmm")
    calls = {call["index"]: call["function"] for call in message["tool_calls"]}
    assert calls == {0: {"name": "f", "arguments": "{}"}, 1: {"name": "g", "arguments": ""}}
    assert choice["finish_reason"] == "tool_calls"
