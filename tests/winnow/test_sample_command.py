"""`winnow sample` as a person types it: servers over real HTTP, tiny local models, kills, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from feedback.jsonl import read_records, write_records
from feedback.records import parse_ranking
from tests.conftest import StartProxy
from tests.fakes.models import build_tiny_causal_lm, build_tiny_reward_model
from tests.fakes.serving import serving
from tests.fakes.upstream import FakeUpstream, Received, Reply, error_reply
from winnow.__main__ import run


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Tiny models are much slower on several, the more so when the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture
def upstream() -> FakeUpstream:
    return FakeUpstream()


@pytest.fixture
def url(upstream: FakeUpstream) -> Iterator[str]:
    with serving(upstream) as address:
        yield f"{address}/v1"
        upstream.release()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [{"id": f"q{i}", "prompt": f"question {i}"} for i in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def sample(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exited:
        run(["sample", *map(str, arguments)])
    assert isinstance(exited.value.code, int)
    return exited.value.code


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked(received: Received) -> str:
    return str(received.body["messages"][-1]["content"])


def texts(record: dict[str, Any]) -> list[str]:
    return [completion[0]["content"] for completion in record["completions"]]


def test_a_server_answers_with_n_and_the_settings_are_told(
    upstream: FakeUpstream, url: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sesame")
    upstream.script = lambda received: Reply(texts=[f"{asked(received)}, {i}" for i in range(3)])
    settings = ["--temperature", "0.7", "--max-tokens", "9", "--stop", "END", "--body", '{"top_k": 5}']
    output = tmp_path / "out.jsonl"
    key = ["--key-variable", "MY_KEY"]
    assert sample("--prompts", prompts, "-k", "3", "-o", output, "--base-url", url, *key, *settings) == 0
    found = records(output)
    assert [one["id"] for one in found] == ["q0", "q1", "q2", "q3"]
    assert [texts(one) for one in found] == [[f"question {q}, {i}" for i in range(3)] for q in range(4)]
    assert found[0]["model"] == "fake-model", "the first that the server lists"
    body = upstream.received[0].body
    assert {name: body[name] for name in ("n", "temperature", "max_tokens", "stop", "top_k")} == {
        "n": 3, "temperature": 0.7, "max_tokens": 9, "stop": ["END"], "top_k": 5,
    }  # fmt: skip
    assert {one.headers["authorization"] for one in upstream.received} == {"Bearer sesame"}
    assert "sesame" not in output.read_text(encoding="utf-8")


def test_seeds_reach_a_server_one_by_one(upstream: FakeUpstream, url: str, prompts: Path, tmp_path: Path) -> None:
    arguments = ["--prompts", prompts, "-k", "2", "--base-url", url, "--model", "m", "--seed", "5"]
    assert sample(*arguments, "-o", tmp_path / "out.jsonl") == 0
    sent = sorted((asked(one), one.body["seed"]) for one in upstream.received)
    kept = [(one["prompt"][0]["content"], seed) for one in records(tmp_path / "out.jsonl") for seed in one["seeds"]]
    assert sent == sorted(kept)


def test_failed_calls_are_made_again_when_the_server_says(
    upstream: FakeUpstream, url: str, prompts: Path, tmp_path: Path
) -> None:
    tries: dict[str, int] = {}

    def script(received: Received) -> Reply:
        tries[asked(received)] = count = tries.get(asked(received), 0) + 1
        if count == 1:
            return error_reply(429, retry_after_ms="20")
        return error_reply(503, retry_after_ms="1") if count == 2 else Reply()

    upstream.script = script
    assert sample("--prompts", prompts, "-k", "1", "-o", tmp_path / "out.jsonl", "--base-url", url) == 0
    assert tries == {f"question {i}": 3 for i in range(4)}


def test_prompts_that_fail_for_good_are_told_with_their_lines(
    upstream: FakeUpstream, url: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream.script = lambda received: error_reply(400) if asked(received) == "question 2" else Reply()
    output = tmp_path / "out.jsonl"
    arguments = ["--prompts", prompts, "-k", "1", "--base-url", url, "-o", output]
    assert sample(*arguments) == 1
    complaint = capsys.readouterr().err
    assert f"{prompts}:3: The upstream upstream answered 400: scripted 400" in complaint
    assert "1 of 4 prompts failed; the others are in" in complaint
    assert not output.exists()
    assert len(records(tmp_path / "out.jsonl.partial")) == 3
    assert sample(*arguments, "--allow-failures", "1") == 0
    assert [one["id"] for one in records(output)] == ["q0", "q1", "q3"]
    assert [asked(one) for one in upstream.received[4:]] == ["question 2"]
    assert not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.parametrize("reply", [error_reply(401), error_reply(404), error_reply(429, code="insufficient_quota")])
def test_a_refusal_of_everything_ends_the_run(
    reply: Reply, upstream: FakeUpstream, url: str, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream.script = lambda received: reply
    assert sample("--prompts", prompts, "--base-url", url, "--model", "m", "--at-once", "1") == 1
    assert len(upstream.received) <= 2, "with n, and once without it"
    assert "1 of 4 prompts failed and 3 were not asked" in capsys.readouterr().err


def test_a_killed_run_loses_only_what_was_under_way(
    upstream: FakeUpstream, url: str, prompts: Path, tmp_path: Path
) -> None:
    # One at a time: when the third prompt is asked, the first two are on disk.
    upstream.script = lambda received: Reply(hold=received.number == 2)
    output = tmp_path / "out.jsonl"
    arguments = ["--prompts", str(prompts), "-k", "1", "--base-url", url, "--at-once", "1", "-o", str(output)]
    command = [sys.executable, "-m", "winnow", "sample", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        upstream.wait_for(lambda server: len(server.received) == 3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not output.exists()
    assert [one["id"] for one in records(tmp_path / "out.jsonl.partial")] == ["q0", "q1"]
    upstream.release()
    assert sample(*arguments) == 0
    assert [asked(one) for one in upstream.received[3:]] == ["question 2", "question 3"]
    assert [one["id"] for one in records(output)] == ["q0", "q1", "q2", "q3"]


def test_peoples_ranks_outlive_the_prompts_that_are_added(url: str, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    arguments = ["--prompts", str(prompts), "-k", "2", "--base-url", url, "-o", str(output)]
    assert sample(*arguments) == 0
    first, *others = records(output)
    write_records(output, [first | {"ranks": [2, 1], "annotator": "ann"}, *others])
    with prompts.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "one more"}\n')
    assert sample(*arguments) == 0
    assert len(records(output)) == 5
    assert (records(output)[0]["ranks"], records(output)[0]["annotator"]) == ([2, 1], "ann")


def test_a_slow_pace_makes_no_call_late(url: str, tmp_path: Path) -> None:
    """The last of these calls waits three seconds for its turn: that is no time-out."""
    prompts = tmp_path / "one.jsonl"
    prompts.write_text('{"prompt": "question"}\n', encoding="utf-8")
    slowly = ["--at-once", "1", "--per-minute", "60", "--timeout-s", "2", "--max-retries", "0"]
    assert sample("--prompts", prompts, "-k", "5", "--seed", "1", "--base-url", url, "--model", "m", *slowly) == 0


def test_winners_of_a_proxy_are_drawn_one_by_one(start_proxy: StartProxy, prompts: Path, tmp_path: Path) -> None:
    """`n` of a winnow proxy gives the best of one drawing, which are no independent best-of-2s."""
    proxy = start_proxy(route={"best_of": 2})
    proxy.upstream.script = lambda received: Reply(texts=["good good", "good", "bad", "bad bad"])
    output = tmp_path / "out.jsonl"
    arguments = ["--base-url", f"{proxy.url}/v1", "--model", "m", "--at-once", "1"]
    assert sample("--prompts", prompts, "-k", "2", "-o", output, *arguments) == 0
    for record in records(output):
        assert texts(record) == ["good good", "good good"], "each the best of a drawing of its own"


def test_a_local_model_is_sampled_scored_and_ranked(prompts: Path, tmp_path: Path) -> None:
    model, judge = build_tiny_causal_lm(tmp_path / "lm"), build_tiny_reward_model(tmp_path / "rm")
    found = []
    for name in ("one", "two"):
        output = tmp_path / f"{name}.jsonl"
        local = ["--local-model", model, "--device", "cpu", "--max-tokens", "6", "--seed", "3"]
        judging = ["--reward-model", judge, "--ranks"]
        assert sample("--prompts", prompts, "-k", "3", "-o", output, *local, *judging) == 0
        found.append(records(output))
    one, two = found
    assert [texts(record) for record in one] == [texts(record) for record in two], "the same seed"
    assert len({text for record in one for text in texts(record)}) > 4
    assert one[0]["sampling"] == {"count": 3, "max_tokens": 6, "seed": 3}
    for record, ranking in zip(one, read_records([tmp_path / "one.jsonl"], parse_ranking), strict=True):
        best = record["rewards"].index(max(record["rewards"]))
        assert ranking.ranks[best] == 1
        assert record["reward_model"] == "rm"


def test_without_a_file_records_go_to_standard_output(
    url: str, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample("--prompts", prompts, "-k", "1", "--base-url", url, "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [texts(json.loads(line)) for line in lines] == [["an answer"]] * 4
    assert sample("--prompts", prompts, "-k", "1", "--base-url", url) == 0
    assert capsys.readouterr().out.count("an answer") == 4


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--model", "m"], "needs --base-url"),
        (["--base-url", "http://127.0.0.1:1/v1", "--local-model", "m"], "completions come from one of them"),
        (["--base-url", "nowhere"], "nowhere: no base URL"),
        (["--temperature", "0"], "--temperature 0 gives 4 times the same completion"),
        (["--ranks"], "--ranks: needs --reward-model"),
        (["--body", "[]"], "--body: must be a JSON object"),
        (["--body", '{"n": 2}'], "--body: n has an option of its own"),
        (["--local-model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["-o", "out.parquet"], "name the file .jsonl"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str], problem: str, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample("--prompts", prompts, *arguments) == 2
    assert problem in capsys.readouterr().err.splitlines()[-1]


def test_a_server_that_is_not_there_or_lists_nothing_is_one_line(
    upstream: FakeUpstream, url: str, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample("--prompts", prompts, "--base-url", "http://127.0.0.1:1/v1") == 1
    assert "http://127.0.0.1:1/v1: The upstream upstream cannot be reached" in capsys.readouterr().err
    assert sample("--prompts", prompts, "--base-url", f"{url}/elsewhere") == 1
    assert "lists no model: name one with --model" in capsys.readouterr().err


def test_a_bad_prompt_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "fine"}\n{"question": "?"}\n', encoding="utf-8")
    assert sample("--prompts", bad, "--base-url", "http://127.0.0.1:1/v1") == 2
    assert f"{bad}:2: prompt: is missing" in capsys.readouterr().err
