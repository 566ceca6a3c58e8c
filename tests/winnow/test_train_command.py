"""`winnow train reward` as a person types it: what it prints, where it writes, how it says no."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fakes.models import build_tiny_causal_lm
from winnow.__main__ import run

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Tiny models are much slower on several, the more so when the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_causal_lm(tmp_path_factory.mktemp("base"))


def write_config(folder: Path, base: Path, **more: object) -> Path:
    config = folder / "config.yaml"
    settings = {
        "base": str(base),
        "output": str(folder / "run"),
        "train": ["${SAMPLE}/oasst_rankings.train.jsonl.gz", "${SAMPLE}/oasst_preferences.train.jsonl.gz"],
        "validation": ["${SAMPLE}/oasst_preferences.validation.jsonl.gz"],
        "pooling": ["last", "mean"],
        "max_length": 256,
        "device": "cpu",
        "mixed_precision": "no",
        **more,
    }
    config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return config


@pytest.fixture(autouse=True)
def sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLE", str(DATA))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line on stderr of a command that must fail with exit code 2."""
    with pytest.raises(SystemExit) as exited:
        run([str(argument) for argument in arguments])
    assert exited.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("winnow: ")
    return line


def test_real_data_become_a_reward_model(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, base)
    with pytest.raises(SystemExit) as exited:
        run(["train", "reward", "--config", str(config), "--set", "name=sample", "--set", "head_fit.l2=[1e-3, 1e-2]"])
    assert exited.value.code == 0
    captured = capsys.readouterr()
    assert captured.out == "", "standard output is for results"
    assert "reward model in" in captured.err
    record = json.loads((tmp_path / "run" / "model" / "reward.json").read_text(encoding="utf-8"))
    assert record["name"] == "sample"
    assert record["training"]["l2"]["all"] in (1e-3, 1e-2)
    assert record["accuracy"]["oasst_en"]["pairs"] == 20
    assert [entry["file"] for entry in record["training"]["data"]] == [
        "oasst_rankings.train.jsonl.gz",
        "oasst_preferences.train.jsonl.gz",
    ]


def test_a_bad_record_is_named_by_file_line_and_field(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "pairs.jsonl"
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    data.write_text(f'{json.dumps(good)}\n{{"prompt": "p", "chosen": "a", "rejected": 3}}\n', encoding="utf-8")
    config = write_config(tmp_path, base, train=[str(data)], validation=[])
    assert f"{data}:2: rejected: " in refusal(capsys, "train", "reward", "--config", config)
    assert not (tmp_path / "run").exists(), "nothing half-written"


def test_bad_records_can_be_skipped_and_are_counted(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"}) for i in range(8)]
    data.write_text("\n".join([*lines, "no json", '{"prompt": "p"}']), encoding="utf-8")
    config = write_config(tmp_path, base, train=[str(data)], validation=[])
    with pytest.raises(SystemExit) as exited:
        run(["train", "reward", "--config", str(config), "--set", "skip_invalid=true"])
    assert exited.value.code == 0
    record = json.loads((tmp_path / "run" / "model" / "reward.json").read_text(encoding="utf-8"))
    assert record["training"]["skipped_records"] == 2
    assert record["training"]["pairs"] == {"pairs": 8}, "the file's name where records name no source"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["learnin_rate=1"], "config.yaml: learnin_rate: no such setting; did you mean learning_rate?"),
        (["epochs=none"], "config.yaml: epochs: "),
        (["tuning=lora", "gated=true"], "gated: needs tuning: head"),
        (["train=[nowhere.jsonl]"], "nowhere.jsonl: no such file"),
        (["base=package:no-such-package"], "no-such-package"),
        (["device=nonsense"], "device: 'nonsense' is not a device"),
        (["seed"], "--set seed: write it as key=value"),
    ],
)
def test_wrong_settings_are_one_line(
    overrides: list[str], problem: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, base)
    flags = [flag for override in overrides for flag in ("--set", override)]
    assert problem in refusal(capsys, "train", "reward", "--config", config, *flags)
    assert not (tmp_path / "run").exists()


def test_usage_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config" in refusal(capsys, "train", "reward")
    assert "no such option" in refusal(capsys, "train", "reward", "--config", "x", "--confg", "y").lower()
    assert "No such file" in refusal(capsys, "train", "reward", "--config", "nowhere.yaml")


def test_a_launcher_that_did_not_start_what_it_promised_is_refused(base: Path, tmp_path: Path) -> None:
    """As `accelerate launch --cpu --num_processes 2` sets up the one process it starts."""
    config = write_config(tmp_path, base)
    launched = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-m", "winnow", "train", "reward", "--config", str(config)],
        env={**os.environ, **launched, "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 2
    assert "start with torchrun" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_real_data_become_a_policy(method: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = {"sft": "demonstrations", "dpo": "oasst_preferences"}[method]
    config = tmp_path / "config.yaml"
    settings = {"base": str(base), "output": str(tmp_path / "run"), "max_length": 64, "device": "cpu", "epochs": 0.2}
    config.write_text(json.dumps({**settings, "train": [f"${{SAMPLE}}/{kind}.train.jsonl.gz"]}), encoding="utf-8")
    with pytest.raises(SystemExit) as exited:
        run(["train", method, "--config", str(config), "--set", "micro_batch_tokens=512", "--set", "lora.rank=2"])
    assert exited.value.code == 0
    captured = capsys.readouterr()
    assert captured.out == "", "standard output is for results"
    assert "winnow serve --local-model" in captured.err
    assert (tmp_path / "run" / "policy" / "config.json").is_file()
    assert "holds a finished run" in refusal(capsys, "train", method, "--config", config)


def test_a_bad_demonstration_is_named_by_file_line_and_field(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "demonstrations.jsonl"
    data.write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "p"}\n', encoding="utf-8")
    config = tmp_path / "config.yaml"
    settings = {"base": str(base), "output": str(tmp_path / "run"), "train": [str(data)]}
    config.write_text(json.dumps(settings), encoding="utf-8")
    assert f"{data}:2: completion: is missing" in refusal(capsys, "train", "sft", "--config", config)
    assert not (tmp_path / "run").exists()
