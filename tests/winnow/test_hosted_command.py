"""`winnow hosted …` as a person types it, against a fine-tuning server over real HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes.finetuning import KEY, FakeFineTuning
from tests.fakes.serving import serving
from winnow.__main__ import run

DATA = Path(__file__).parent.parent / "data"
CONFIG = Path(__file__).parents[2] / "training" / "configs" / "hosted-dpo.yaml"


class Shell:
    """Runs commands; what they printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object, code: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as exited:
            run(["hosted", *(str(argument) for argument in arguments)])
        captured = self._capsys.readouterr()
        assert exited.value.code == code, captured.err
        assert KEY not in captured.out + captured.err
        return captured.out, captured.err


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeFineTuning, str]]:
    for variable in ("OPENAI_API_KEY", "TOGETHER_API_KEY", "FIREWORKS_API_KEY"):
        monkeypatch.setenv(variable, KEY)
    server = FakeFineTuning()
    with serving(server) as url:
        yield server, url


def config(folder: Path, url: str, **settings: Any) -> Path:
    data = folder / "data.jsonl"
    records = [{"prompt": f"p{number}", "completion": f"c{number}"} for number in range(10)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    file = folder / "hosted.yaml"
    given = {"provider": "openai", "model": "gpt-mini", "train": [str(data)], "output": str(folder / "tuned")}
    file.write_text(yaml.safe_dump(given | {"base_url": f"{url}/v1", "poll_s": 0.001} | settings), encoding="utf-8")
    return file


def test_from_records_to_a_route(fake: tuple[FakeFineTuning, str], tmp_path: Path, shell: Shell) -> None:
    server, url = fake
    file, folder = config(tmp_path, url), tmp_path / "tuned"
    shown, _ = shell("prepare", "--config", file, "--set", "dollars_per_million_tokens=25", "--dry-run")
    assert "sft for gpt-mini at openai" in shown
    assert "dollars for one pass (the provider may make more)" in shown
    assert not folder.exists()
    _, said = shell("prepare", "--config", file)
    assert f"next: winnow hosted create {folder}" in said.replace("\n", "")
    assert server.calls == [], "nothing was sent so far"
    shown, said = shell("create", folder)
    assert "ftjob-" in shown
    assert "6 January 2027" in " ".join(said.split()), "whoever starts there knows that it ends"
    shown, _ = shell("status", folder)
    assert "validating" in shown
    shell("status", folder, "--route-file", tmp_path / "early.yaml", code=1)
    route = tmp_path / "route.yaml"
    shown, said = shell("status", folder, "--follow", "--route-file", route)
    assert next(line for line in said.splitlines() if "Step 3" in line).endswith("train_loss 0.25)")
    assert "ckpt-step-2" in shown
    assert "succeeded" in shown
    with pytest.raises(SystemExit) as checked:
        run(["config", "check", str(route)])
    assert checked.value.code == 0
    settings = yaml.safe_load(route.read_text(encoding="utf-8"))
    assert settings["upstreams"] == {"openai": {"url": f"{url}/v1", "key": "${OPENAI_API_KEY}"}}
    assert settings["routes"]["tuned"]["model"].startswith("ft:gpt-mini:org::ftjob-")
    _, said = shell("status", folder, "--route-file", route, code=2)
    assert "is there already" in said


def test_results_as_json(fake: tuple[FakeFineTuning, str], tmp_path: Path, shell: Shell) -> None:
    server, url = fake
    server.stages = ("JOB_STATE_RUNNING", "JOB_STATE_COMPLETED")
    settings = {"provider": "fireworks", "account": "me", "base_url": f"{url}/fireworks/v1"}
    file, folder = config(tmp_path, url, **settings), tmp_path / "tuned"
    prepared = json.loads(shell("prepare", "--config", file, "--json")[0])
    assert prepared["train"]["num_rows"] == 10
    assert prepared["dollars"] is None
    created = json.loads(shell("create", folder, "--json")[0])
    assert created["job"] == prepared["run"]
    assert json.loads(shell("status", folder, "--json")[0])["stage"] == "running"
    status = json.loads(shell("status", folder, "--route", "mine", "--json")[0])
    assert status["model"] == f"accounts/me/models/{prepared['run']}"
    route = yaml.safe_load(status["route"])
    assert route["upstreams"]["fireworks"]["url"] == f"{url}/fireworks/inference/v1"
    assert list(route["routes"]) == ["mine"]


def test_a_failed_job_is_a_failed_command(fake: tuple[FakeFineTuning, str], tmp_path: Path, shell: Shell) -> None:
    server, url = fake
    server.stages = ("queued", "failed")
    folder = tmp_path / "tuned"
    shell("prepare", "--config", config(tmp_path, url))
    shell("create", folder)
    _, said = shell("status", folder, "--follow", code=1)
    assert said.splitlines()[-1].endswith("failed: the data taught nothing")
    _, said = shell("cancel", folder, code=1)
    assert "has ended already: failed" in said


@pytest.mark.parametrize("provider", ["openai", "together", "fireworks"])
def test_a_job_can_be_cancelled(provider: str, fake: tuple[FakeFineTuning, str], tmp_path: Path, shell: Shell) -> None:
    server, url = fake
    server.stages = {"fireworks": ("JOB_STATE_RUNNING",)}.get(provider, ("running",))
    prefix = "/v1" if provider == "openai" else f"/{provider}/v1"
    folder = tmp_path / "tuned"
    shell("prepare", "--config", config(tmp_path, url, provider=provider, base_url=url + prefix, account="me"))
    shell("create", folder)
    shown, _ = shell("cancel", folder)
    assert "cancelled" in shown


def test_what_a_person_can_mend_is_one_line(
    fake: tuple[FakeFineTuning, str], tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, url = fake
    file, folder = config(tmp_path, url), tmp_path / "tuned"
    for arguments, problem in (
        (("prepare", "--config", file, "--set", "provder=x"), "provder: no such setting; did you mean provider?"),
        (("prepare", "--config", file, "--set", "model=''"), "model: String should have at least 1 character"),
        (("prepare", "--config", file, "--set", "method=dpo"), "data.jsonl:1: record: is a demonstration: set method"),
        (("prepare", "--config", file, "--set", "train=[no.jsonl]"), "no.jsonl: no such file"),
        (("create", folder), "no prepared.json there: run `winnow hosted prepare` first"),
    ):
        _, said = shell(*arguments, code=2)
        (line,) = said.splitlines()
        assert problem in line
    shell("prepare", "--config", file)
    _, said = shell("status", folder, code=2)
    assert f"no job was created from it: run `winnow hosted create {folder}`" in said
    monkeypatch.delenv("OPENAI_API_KEY")
    _, said = shell("create", folder, code=2)
    assert said.splitlines()[-1] == (
        "winnow: the environment variable OPENAI_API_KEY is not set: it holds the key of openai"
    )
    assert server.calls == []


def test_the_example_configuration_prepares_real_preferences(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = tmp_path / "preferences"
    places.mkdir()
    for split in ("train", "validation"):
        (places / f"oasst_en.{split}.jsonl.gz").symlink_to(DATA / f"oasst_preferences.{split}.jsonl.gz")
    monkeypatch.setenv("WINNOW_DATA", str(tmp_path))
    shown, _ = shell("prepare", "--config", CONFIG, "--json", "--dry-run")
    facts = json.loads(shown)
    assert facts["train"]["num_rows"] > 50
    assert facts["validation"]["num_rows"] > 10
