"""Once against real weights: the embedded SmolLM2-135M-Instruct."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from proxy.upstreams.base import UpstreamCall
from proxy.upstreams.local import LocalUpstream

# The first use on a machine converts the packaged weights, which takes half a minute.
pytestmark = pytest.mark.timeout(300)

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
async def upstream() -> AsyncIterator[LocalUpstream]:
    upstream = LocalUpstream(device="cpu")
    await upstream.open()
    yield upstream
    await upstream.aclose()


async def ask(upstream: LocalUpstream, path: str, **members: Any) -> dict[str, Any]:
    response = await upstream.send(UpstreamCall("POST", path, orjson.dumps(members)))
    body: dict[str, Any] = orjson.loads(await response.read())
    assert response.status == 200, body
    return body


async def test_the_embedded_model_knows_paris(upstream: LocalUpstream) -> None:
    completed, chatted = await asyncio.gather(
        ask(upstream, "/completions", prompt="The capital of France is", temperature=0, max_tokens=4),
        ask(upstream, "/chat/completions", messages=QUESTION, temperature=0, max_tokens=16),
    )
    assert "Paris" in completed["choices"][0]["text"]
    assert "Paris" in chatted["choices"][0]["message"]["content"]
    assert chatted["choices"][0]["finish_reason"] == "stop"
    assert chatted["model"] == "SmolLM2-135M-Instruct"


async def test_candidates_differ_and_seeds_repeat_them(upstream: LocalUpstream) -> None:
    members: dict[str, Any] = {"messages": QUESTION, "n": 4, "seed": 11, "temperature": 0.8, "max_tokens": 12}
    first, again = [await ask(upstream, "/chat/completions", **members) for _ in range(2)]
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert len(set(texts)) == 4
    assert [choice["message"]["content"] for choice in again["choices"]] == texts
