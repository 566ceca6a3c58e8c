"""The scoring service alone: what other engines send, and what they get."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from prometheus_client import CollectorRegistry

from proxy.app import Parts, create_app
from proxy.config_loading import load_settings
from proxy.upstreams.absent import AbsentUpstream
from tests.fakes.scorer import FakeScorer
from tests.fakes.serving import serving

KEY = {"authorization": "Bearer k"}
TEXTS = ["good good", "bad"]
SIGMOIDS = [1 / (1 + math.exp(-4)), 1 / (1 + math.exp(2))]


@pytest.fixture(scope="module")
def service() -> Iterator[httpx2.Client]:
    settings = load_settings(flags={"server": {"api_keys": ["k"]}})
    parts = Parts({settings.default_upstream: AbsentUpstream("local")}, {"default": FakeScorer()})
    app = create_app(settings, parts, CollectorRegistry(), scores_only=True)
    with serving(app.asgi) as url, httpx2.Client(base_url=url, headers=KEY) as client:
        yield client


def ask(service: httpx2.Client, path: str, body: Any) -> Any:
    answer = service.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_openrlhf(service: httpx2.Client) -> None:
    answer = ask(service, "/get_reward", {"query": TEXTS, "prompts": ["", ""], "labels": ["", ""]})
    assert answer["rewards"] == [2.0, -1.0]
    assert answer["extra_logs"] == {"raw_reward": [4.0, -2.0]}
    assert all(0 <= score <= 1 for score in answer["scores"])


def test_openrlhf_sends_empty_lists_to_all_servers_but_the_first(service: httpx2.Client) -> None:
    assert ask(service, "/get_reward", {"query": [], "prompts": [], "labels": []}) == {
        "rewards": [], "scores": [], "extra_logs": {}
    }  # fmt: skip


def test_vllm_classify_is_raw_only_where_asked(service: httpx2.Client) -> None:
    raw = ask(service, "/classify", {"model": "any", "input": TEXTS, "activation": False})
    assert [one["probs"] for one in raw["data"]] == [[4.0], [-2.0]]
    assert raw["object"] == "list" and raw["usage"]["total_tokens"] > 0
    squashed = ask(service, "/classify", {"model": "any", "input": TEXTS})
    assert [one["probs"][0] for one in squashed["data"]] == pytest.approx(SIGMOIDS)


def test_vllm_pooling_of_messages(service: httpx2.Client) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "good"}]
    assert ask(service, "/pooling", {"model": "any", "messages": messages})["data"][0]["data"] == [2.0]


def test_sglang_embeddings(service: httpx2.Client) -> None:
    answer = ask(service, "/v1/embeddings", {"model": "any", "input": "good"})
    assert answer["data"][-1]["embedding"][-1] == 2.0


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ("good", [{"score": 2.0, "label": "LABEL_0"}]),
        (["x", "good good"], [{"score": 4.0, "label": "LABEL_0"}]),
        ([["x", "good"], ["bad"]], [[{"score": 2.0, "label": "LABEL_0"}], [{"score": -2.0, "label": "LABEL_0"}]]),
    ],
)
def test_tei_predict(service: httpx2.Client, inputs: Any, expected: Any) -> None:
    assert ask(service, "/predict", {"inputs": inputs, "raw_scores": True}) == expected


def test_tei_rerank_is_best_first(service: httpx2.Client) -> None:
    body = {"query": "x", "texts": ["bad", "good good", "so"], "raw_scores": True, "return_text": True}
    assert ask(service, "/rerank", body) == [
        {"index": 1, "score": 4.0, "text": "good good"},
        {"index": 2, "score": 0.0, "text": "so"},
        {"index": 0, "score": -2.0, "text": "bad"},
    ]


def test_neighbours_with_one_prompt_are_scored_together_and_keep_their_order(service: httpx2.Client) -> None:
    inputs = [["x", "good"], ["x", "bad"], ["y", "good"], ["x", "good good"]]
    scores = [row[0]["score"] for row in ask(service, "/predict", {"inputs": inputs, "raw_scores": True})]
    assert scores == [2.0, -2.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/get_reward", {"query": 3}, "query"),
        ("/get_reward", {"query": ["a"], "prompts": []}, "prompts"),
        ("/classify", {}, "input"),
        ("/pooling", {"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ("/predict", {"inputs": {"a": 1}}, "inputs"),
        ("/rerank", {"query": 1, "texts": ["a"]}, "query"),
    ],
)
def test_bad_shapes_are_named(service: httpx2.Client, path: str, body: Any, says: str) -> None:
    answer = service.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(says)


def test_every_path_needs_the_key_but_those_of_the_operations(service: httpx2.Client) -> None:
    bare = {"authorization": ""}
    for path in ("/get_reward", "/predict", "/v1/score", "/anything"):
        assert service.post(path, json={}, headers=bare).status_code == 401
    assert service.get("/healthz", headers=bare).status_code == 200
    assert service.get("/readyz", headers=bare).json()["ready"]


def test_it_scores_and_does_nothing_else(service: httpx2.Client) -> None:
    assert ask(service, "/v1/score", {"prompt": "x", "completions": ["good"]})["scores"][0]["reward"] == 1.0
    assert [model["id"] for model in service.get("/v1/models").json()["data"]] == ["fake"]
    for path in ("/v1/chat/completions", "/v1/files"):
        answer = service.post(path, json={})
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"
    assert service.get("/classify").status_code == 405
