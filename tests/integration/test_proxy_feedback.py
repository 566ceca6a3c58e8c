"""Served, stored, judged, and read by training: over real HTTP, with a real database."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from feedback.jsonl import read_records, write_records
from feedback.judgements import CandidateSet, StoredJudgement, as_json, training_records
from feedback.rankings import group_comparisons
from feedback.records import Ranking, parse_ranking
from feedback.store import DatabaseStore
from tests.conftest import RunningProxy, StartProxy
from tests.fakes.upstream import Received, Reply, error_reply

MESSAGES = [{"role": "user", "content": "My address is jane@mail.example.com. Say something."}]
TEXTS = ("good good", "bad", "", "good")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "feedback.db"


@pytest.fixture
def keeping(start_proxy: StartProxy, file: Path) -> RunningProxy:
    proxy = start_proxy(
        route={"log_candidates": True},
        feedback={"database": f"sqlite:///{file}"},
        prices={"m": {"prompt": 1.0, "completion": 1.0}},
    )
    proxy.upstream.script = lambda received: Reply(texts=TEXTS)
    return proxy


@pytest.fixture
def store(file: Path) -> Iterator[DatabaseStore]:
    store = DatabaseStore(f"sqlite:///{file}")
    yield store
    store.close()


def serve(proxy: RunningProxy, **fields: Any) -> str:
    body = {"model": "m", "messages": MESSAGES, "temperature": 0.5} | fields
    answer = httpx2.post(f"{proxy.url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == 200
    return str(answer.headers["x-winnow-completion-id"])


def say(proxy: RunningProxy, completion_id: str, /, **fields: Any) -> httpx2.Response:
    body = {"completion_id": completion_id} | fields
    return httpx2.post(f"{proxy.url}/v1/feedback", json=body, timeout=30)


def judged(store: DatabaseStore) -> list[tuple[CandidateSet, list[StoredJudgement]]]:
    return [(one, list(said)) for one, said in store.judged_sets()]


def test_what_each_head_said_is_kept(keeping: RunningProxy, store: DatabaseStore) -> None:
    keeping.scorer.std, keeping.scorer.objectives = 0.25, {"helpful": 1.5, "harmless": -0.5}
    assert say(keeping, serve(keeping), rating=1).status_code == 200
    ((candidate_set, _),) = judged(store)
    valid = [one for one in candidate_set.candidates if one.valid]
    assert {one.std for one in valid} == {0.25}
    assert all(one.objectives == {"helpful": 1.5, "harmless": -0.5} for one in valid)
    (unscored,) = (one for one in candidate_set.candidates if not one.valid)
    assert (unscored.std, unscored.objectives) == (None, None)


def test_from_an_answer_to_what_training_reads(keeping: RunningProxy, store: DatabaseStore, tmp_path: Path) -> None:
    completion_id = serve(keeping)
    answer = say(keeping, completion_id, ranking=[[3], [0, 1]], annotator="anna", labels={"helpful": True})
    assert answer.status_code == 200
    assert answer.json()["completion_id"] == completion_id and answer.json()["repeated"] is False
    ((candidate_set, said),) = judged(store)
    assert said[0].id == answer.json()["id"] and said[0].judgement.labels == {"helpful": True}
    assert candidate_set.prompt == [{"role": "user", "content": "My address is [EMAIL]. Say something."}]
    assert [one.message["content"] for one in candidate_set.candidates] == list(TEXTS)
    assert [one.reward for one in candidate_set.candidates] == [2.0, -1.0, None, 1.0]
    assert [one.valid for one in candidate_set.candidates] == [True, True, False, True]
    assert (candidate_set.winner, candidate_set.accepted) == (0, True)
    assert (candidate_set.route, candidate_set.endpoint, candidate_set.model) == ("default", "chat", "m")
    assert (candidate_set.reward_model, candidate_set.strategy) == ("fake", "best_of_n")
    assert candidate_set.policy["sampling"] == {"temperature": 0.5}
    assert candidate_set.policy["usage"] == {
        "prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11, "estimated": False, "cost": 11e-6
    }  # fmt: skip
    records = list(training_records(judged(store)))
    write_records(tmp_path / "rankings.jsonl", map(as_json, records))
    read = list(read_records([tmp_path / "rankings.jsonl"], parse_ranking))
    assert isinstance(records[0], Ranking) and read == records
    (group,) = group_comparisons(read)
    assert {(group.completions[p.better][0]["content"], group.completions[p.worse][0]["content"]) for p in group.pairs}
    assert group.source == "feedback/ranking" and len(group.pairs) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_every_way_to_say_something(keeping: RunningProxy, store: DatabaseStore, stream: bool) -> None:
    completion_id = serve(keeping, stream=stream)
    for said in (
        {"rating": -1},
        {"rating": 7},
        {"preferred": 1},
        {"correction": "x"},
        {"comment": "c"},
        {"labels": {}},
    ):
        assert say(keeping, completion_id, **said).status_code == 200, said
    ((_, judgements),) = judged(store)
    assert len(judgements) == 6
    assert keeping.metric("winnow_feedback_total", kind="rating") == 2


def test_a_repeat_is_stored_once(keeping: RunningProxy, store: DatabaseStore) -> None:
    completion_id = serve(keeping)
    first, again = (say(keeping, completion_id, rating=1, annotator="a").json() for _ in range(2))
    assert again == first | {"repeated": True}
    other = say(keeping, completion_id, rating=1, annotator="b").json()
    assert other["id"] != first["id"] and other["repeated"] is False
    assert keeping.metric("winnow_feedback_total", kind="rating") == 2


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({}, 400, None),
        ({"annotator": "a"}, 400, None),
        ({"rating": 8}, 400, "rating"),
        ({"rating": -2}, 400, "rating"),
        ({"rating": "good"}, 400, "rating"),
        ({"rating": True}, 400, "rating"),
        ({"preferred": 4}, 400, "preferred"),
        ({"preferred": -1}, 400, "preferred"),
        ({"ranking": [[0], [9]]}, 400, "ranking"),
        ({"ranking": [[0], [0]]}, 400, "ranking"),
        ({"ranking": [[0]]}, 400, "ranking"),
        ({"ranking": [[0, 1], []]}, 400, "ranking"),
        ({"ranking": [0, 1]}, 400, "ranking.0"),
        ({"correction": ""}, 400, "correction"),
        ({"raiting": 1}, 400, "raiting"),
        ({"rating": 1, "completion_id": "a b"}, 400, "completion_id"),
    ],
)
def test_bad_judgements(keeping: RunningProxy, fields: dict[str, Any], status: int, param: str | None) -> None:
    answer = say(keeping, serve(keeping), **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_a_failed_candidate_cannot_be_preferred(keeping: RunningProxy) -> None:
    def script(received: Received) -> Reply:
        return error_reply(400) if received.number == 2 else Reply(texts=TEXTS, honours_n=False)

    keeping.upstream.script = script
    completion_id = serve(keeping, seed=1)
    assert say(keeping, completion_id, preferred=2).status_code == 400
    assert say(keeping, completion_id, preferred=3).status_code == 200


def test_unknown_completions(keeping: RunningProxy, proxy: RunningProxy) -> None:
    answer = say(keeping, "winnow-unknown", rating=1)
    assert answer.status_code == 404 and answer.json()["error"]["param"] == "completion_id"
    answer = say(proxy, "winnow-unknown", rating=1)
    assert answer.status_code == 404 and "log_candidates is off" in answer.json()["error"]["message"]
    assert not keeping.upstream.others and not proxy.upstream.others
    assert httpx2.get(f"{keeping.url}/v1/feedback").status_code == 405


def test_several_prompts_are_several_sets(keeping: RunningProxy, store: DatabaseStore) -> None:
    keeping.upstream.script = lambda received: Reply(texts=("good", "bad"))
    body = {"model": "m", "prompt": ["one", "two"], "best_of": 2}
    answer = httpx2.post(f"{keeping.url}/v1/completions", json=body, timeout=30)
    completion_id = answer.headers["x-winnow-completion-id"]
    assert say(keeping, completion_id, rating=1).status_code == 200
    assert say(keeping, f"{completion_id}.1", preferred=1).status_code == 200
    assert say(keeping, f"{completion_id}.2", rating=1).status_code == 404
    assert sorted(one.prompt[0]["content"] for one, _ in judged(store)) == ["one", "two"]


def test_a_store_that_is_away_costs_no_answer(start_proxy: StartProxy, tmp_path: Path) -> None:
    nowhere = tmp_path / "later" / "feedback.db"
    proxy = start_proxy(
        route={"log_candidates": True},
        feedback={"database": f"sqlite:///{nowhere}", "retry_s": 0.0, "flush_s": 1.0, "max_batch": 1},
    )
    completion_id = serve(proxy)
    answer = say(proxy, "winnow-unknown", rating=1)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "feedback_store_unavailable"
    assert answer.headers["retry-after"] == "1"
    assert "later" not in answer.text
    assert proxy.metric("winnow_recorder_failures_total") >= 1
    nowhere.parent.mkdir()
    assert serve(proxy) != completion_id
    assert say(proxy, serve(proxy), rating=1).status_code == 200, "it recovers alone"


def test_judging_needs_a_key_like_everything_else(start_proxy: StartProxy, file: Path) -> None:
    proxy = start_proxy(
        server={"api_keys": ["client-key"]},
        route={"log_candidates": True},
        feedback={"database": f"sqlite:///{file}"},
    )
    assert say(proxy, "winnow-1", rating=1).status_code == 401
    proxy.client.chat.completions.create(model="m", messages=MESSAGES)
    with sqlite3.connect(file) as connection:
        assert b"client-key" not in b"".join(line.encode() for line in connection.iterdump())
    connection.close()
