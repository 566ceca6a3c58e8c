"""`winnow train distill` as a person types it: a tiny model learns from its own best answers, or from a server's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes.models import build_tiny_causal_lm, build_tiny_reward_model
from tests.fakes.serving import serving
from tests.fakes.upstream import FakeUpstream, Reply, error_reply
from winnow.__main__ import run


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Tiny models are much slower on several, the more so when the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(4)), encoding="utf-8")
    settings = {
        "output": str(tmp_path / "run"),
        "base": str(build_tiny_causal_lm(tmp_path / "base")),
        "reward_model": str(build_tiny_reward_model(tmp_path / "judge")),
        "prompts": [str(prompts)],
        "samples_per_prompt": 3,
        "max_new_tokens": 8,
        "keep_cut_off": True,
        "tuning": "lora",
        "max_length": 96,
        "epochs": 1,
        "device": "cpu",
        "mixed_precision": "no",
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return path


def train(config: Path, *overrides: str) -> int:
    with pytest.raises(SystemExit) as exited:
        run(["train", "distill", "--config", str(config), *(part for one in overrides for part in ("--set", one))])
    assert isinstance(exited.value.code, int)
    return exited.value.code


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_model_is_distilled_and_says_where_it_is(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config) == 0
    captured = capsys.readouterr()
    assert captured.out == "", "standard output is for results"
    assert f"winnow serve --local-model {tmp_path / 'run' / 'policy'}" in captured.err.replace("\n", "")
    assert (tmp_path / "run" / "policy" / "adapter_config.json").is_file()
    for winner, scored in zip(
        lines(tmp_path / "run" / "winners.jsonl"), lines(tmp_path / "run" / "scored.jsonl"), strict=True
    ):
        assert winner["reward"] == max(scored["rewards"])


def test_a_server_may_be_the_teacher(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sesame")
    upstream = FakeUpstream()
    upstream.script = lambda received: Reply(texts=["one answer", "another", "a third"])
    with serving(upstream) as url:
        teacher = [f"teacher={url}/v1#big", "teacher_key_variable=TEACHER_KEY"]
        assert train(config, *teacher, "fit=false") == 0
        upstream.script = lambda received: error_reply(401)
        assert train(config, *teacher, "fit=false", "samples_at_once=1", f"output={tmp_path / 'other'}") == 2
    assert {one.body["model"] for one in upstream.received} == {"big"}
    assert upstream.received[0].headers["authorization"] == "Bearer sesame"
    assert len(lines(tmp_path / "run" / "winners.jsonl")) == 4
    assert not (tmp_path / "run" / "policy").exists()
    assert "prompts: 1 of 4 failed, the first at" in capsys.readouterr().err.splitlines()[-1]


def test_wrong_settings_are_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for override, problem in (
        ("min_reward=p101", "min_reward"),
        ("prompts=[]", "prompts: "),
        ("prompts=[nowhere.jsonl]", "nowhere.jsonl: no such file"),
        ("temperature=0", "temperature: "),
        ("winner_per_prompt=1", "did you mean winners_per_prompt?"),
    ):
        assert train(config, override) == 2
        assert problem in capsys.readouterr().err.splitlines()[-1]
