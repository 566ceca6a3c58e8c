"""`winnow eval compare` as a person types it: models, servers, best-of-N behind a proxy, recorded answers, people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import StartProxy
from tests.fakes.models import build_tiny_causal_lm, build_tiny_reward_model
from tests.fakes.serving import serving
from tests.fakes.upstream import FakeUpstream, Reply, error_reply
from winnow.__main__ import run

NUM_PROMPTS = 6


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Tiny models are much slower on several, the more so when the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_reward_model(tmp_path_factory.mktemp("judge") / "judge")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.jsonl", [{"id": f"q{i}", "prompt": f"question {i}"} for i in range(NUM_PROMPTS)])


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


def answers(path: Path, word: str, num: int = NUM_PROMPTS) -> Path:
    return write(path, [{"prompt": f"question {i}", "completion": f"{word} {i}"} for i in range(num)])


def compare(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exited:
        run(["eval", "compare", "--device", "cpu", *map(str, arguments)])
    assert isinstance(exited.value.code, int)
    return exited.value.code


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_two_local_models_are_compared_and_kept(
    judge: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (build_tiny_causal_lm(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two")))
    arguments = ["--a", one, "--b", two, "--prompts", prompts, "--reward-model", judge, "-k", "2", "--seed", "4"]
    files = ["-o", tmp_path / "out.jsonl", "--keep", tmp_path / "kept", "--json"]
    assert compare(*arguments, "--max-tokens", "6", *files) == 0
    found = result(capsys)
    assert found["models"] == [str(one), str(two)]
    assert (found["prompts"], found["meetings"]) == (NUM_PROMPTS, NUM_PROMPTS * 4)
    assert found["wins"] + found["ties"] + found["losses"] == NUM_PROMPTS
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["id"] for record in records] == [f"q{i}" for i in range(NUM_PROMPTS)]
    assert sum(record["score"] for record in records) / NUM_PROMPTS == pytest.approx(found["win_rate"]["value"])
    assert records[0]["systems"] == [str(one)] * 2 + [str(two)] * 2
    # What was drawn is kept and compares again by itself, without a model.
    a, b = tmp_path / "kept" / "a.jsonl", tmp_path / "kept" / "b.jsonl"
    assert compare("--a", a, "--b", b, "--reward-model", judge, "--json") == 0
    again = result(capsys)
    assert again["win_rate"] == found["win_rate"]
    assert again["length_controlled"] == found["length_controlled"]


def test_a_model_draws_even_with_itself(
    judge: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its two samples are independent, also with a seed: else every prompt would be a tie."""
    model = build_tiny_causal_lm(tmp_path / "model")
    arguments = ["--a", model, "--b", model, "--prompts", prompts, "--reward-model", judge, "--seed", "1"]
    assert compare(*arguments, "-k", "4", "--max-tokens", "4", "--json") == 0
    found = result(capsys)
    assert found["win_rate"]["low"] < 0.5 < found["win_rate"]["high"]
    assert found["models"] == [f"{model} (a)", f"{model} (b)"]
    assert found["wins"] + found["losses"] > 0


def test_best_of_n_behind_a_proxy_against_its_upstream(
    start_proxy: StartProxy, judge: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy = start_proxy()
    proxy.upstream.script = lambda received: Reply(texts=["bad", "good good", "good", "bad bad"])
    url = f"{proxy.url}/v1"
    arguments = ["--a", f"{url}#m@4", "--b", f"{url}#m@1", "--prompts", prompts, "--reward-model", judge]
    assert compare(*arguments, "--at-once", "1") == 0
    shown = capsys.readouterr().out
    assert f"{url}#m@4 against {url}#m@1, judged by judge, {NUM_PROMPTS} prompts:" in shown
    assert "at equal length" in shown
    assert {one.body["model"] for one in proxy.upstream.received} == {"m"}
    assert len(proxy.upstream.received) == NUM_PROMPTS * 2, "four candidates by one call, and one"


def test_people_decide(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = answers(tmp_path / "a.jsonl", "first"), answers(tmp_path / "b.jsonl", "second")
    judged = [
        {"prompt": f"question {i}", "chosen": f"first {i}", "rejected": f"second {i}"} for i in range(NUM_PROMPTS - 1)
    ] + [{"prompt": "question 5", "completions": ["first 5", "second 5"], "ranks": [2, 1]}]
    people = write(tmp_path / "people.jsonl", judged)
    output = tmp_path / "out.jsonl"
    assert compare("--a", a, "--b", b, "--judgements", people, "--json", "-o", output) == 0
    found = result(capsys)
    assert (found["judge"], found["wins"], found["losses"]) == ("people", 5, 1)
    assert found["reward_gap"] is None
    assert [json.loads(line)["score"] for line in output.read_text(encoding="utf-8").splitlines()] == [1] * 5 + [0]
    assert compare("--a", a, "--b", b, "--judgements", people, "--require-better") == 1
    assert "--require-better: no significant difference" in capsys.readouterr().err


def test_a_prompt_that_fails_ends_it_unless_allowed(
    judge: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream = FakeUpstream()
    upstream.script = lambda received: error_reply(400) if "question 3" in str(received.body) else Reply()
    with serving(upstream) as url:
        arguments = ["--a", f"{url}/v1#m", "--b", answers(tmp_path / "b.jsonl", "b"), "--prompts", prompts]
        assert compare(*arguments, "--reward-model", judge) == 1
        complaint = capsys.readouterr().err
        assert f"{prompts}:4: The upstream upstream answered 400" in complaint
        assert "1 of 6 prompts failed" in complaint
        assert compare(*arguments, "--reward-model", judge, "--allow-failures", "1", "--json") == 0
    assert result(capsys)["prompts"] == NUM_PROMPTS - 1


def test_bad_usage_is_one_line(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, short = answers(tmp_path / "a.jsonl", "a"), answers(tmp_path / "short.jsonl", "b", num=4)
    nothing = write(tmp_path / "none.jsonl", [])
    cases: list[tuple[list[str | Path], str]] = [
        (["--a", "m", "--b", "n"], "--prompts: is needed"),
        (["--a", a, "--b", short], "has no completions for 2 of the 6 prompts, the first of them"),
        (["--a", a, "--b", tmp_path / "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--a", a, "--b", a, "--judgements", nothing], "--judgements: nothing to compare"),
        (["--a", "/nowhere/at/all", "--b", a, "--prompts", prompts], "/nowhere/at/all"),
        (["--a", nothing, "--b", a], "--prompts: no prompt in the files"),
    ]
    for arguments, problem in cases:
        assert compare(*arguments) == 2, problem
        assert problem in capsys.readouterr().err.splitlines()[-1]
