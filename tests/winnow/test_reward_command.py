"""`winnow reward eval`: every file is read, every number comes with its interval and its baselines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from feedback.jsonl import Skipped
from reward.model import load_reward_model
from tests.fakes.models import build_tiny_causal_lm
from training.comparisons import read_comparisons
from training.evaluation import accuracy_of, pair_outcomes, wilson_interval
from training.options import RewardOptions
from training.reward_model import train_reward_model
from winnow.__main__ import run

DATA = Path(__file__).parent.parent / "data"
VALIDATION = [DATA / "oasst_preferences.validation.jsonl.gz", DATA / "gsm8k_preferences.validation.jsonl.gz"]
TRAIN = [DATA / "oasst_preferences.train.jsonl.gz", DATA / "gsm8k_rankings.train.jsonl.gz"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Tiny models are much slower on several, the more so when the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("eval")
    options = RewardOptions(
        base=str(build_tiny_causal_lm(home / "base")),
        output=str(home / "run"),
        train=[str(path) for path in TRAIN],
        validation=[str(path) for path in VALIDATION],
        pooling=["last", "mean"],
        max_length=256,
        device="cpu",
        mixed_precision="no",
        name="tiny",
    )
    return train_reward_model(options)


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exited:
        run(["reward", "eval", "--device", "cpu", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    assert isinstance(exited.value.code, int)
    return exited.value.code, captured.out, captured.err


def report(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    code, printed, complaint = evaluate(capsys, *arguments, "--json")
    assert code == 0, complaint
    parsed: dict[str, Any] = json.loads(printed)
    return parsed


def test_every_file_after_data_is_read(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shell spells `--data *.validation.jsonl.gz` out as one option value and further arguments."""
    found = report(capsys, "--reward-model", model, "--data", *VALIDATION)
    assert {name: row["pairs"] for name, row in found["sets"].items()} == {
        "oasst_en": 20,
        "gsm8k_solutions": 15,
        "all": 35,
    }
    assert found["reward_model"] == "tiny"
    assert found["truncated"] > 0
    twice = report(capsys, "--reward-model", model, "--data", VALIDATION[0], "--data", VALIDATION[1])
    assert twice["sets"] == found["sets"]


def test_the_numbers_are_the_models(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "--reward-model", model, "--data", *VALIDATION)
    loaded = load_reward_model(str(model), device="cpu")
    groups = read_comparisons([str(path) for path in VALIDATION], False, Skipped())
    rewards = loaded.score_all([loaded.renderer.render(g.prompt, c) for g in groups for c in g.completions])
    expected = accuracy_of(pair_outcomes(groups, rewards))
    row = found["sets"]["all"]
    assert row["accuracy"] == pytest.approx(expected.accuracy)
    assert (row["low"], row["high"]) == pytest.approx(wilson_interval(expected.accuracy * 35, 35))
    # What the folder says of itself is what the command finds.
    stated = loaded.manifest.accuracy
    assert {name: stated[name].accuracy for name in stated} == pytest.approx(
        {name: row["accuracy"] for name, row in found["sets"].items()}
    )


def test_baselines_stand_on_the_same_pairs(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "--reward-model", model, "--data", *VALIDATION, "--baseline-data", *_repeated(TRAIN))
    for row in found["sets"].values():
        assert set(row["baselines"]) == {"longer", "words, own", "words, all"}
        for baseline in row["baselines"].values():
            assert 0 <= baseline["accuracy"] <= 1
            assert 0 < baseline["p_value"] <= 1
            assert baseline["only_first"] + baseline["only_second"] <= row["pairs"]
        assert row["length_bias"]["correlation"] is not None
        assert sum(one["pairs"] for one in row["calibration_bins"]) == row["pairs"]


def _repeated(files: list[Path]) -> list[str | Path]:
    first, *rest = files
    return [first, *(flag for file in rest for flag in ("--baseline-data", file))]


def test_the_table_has_intervals_and_baselines(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = evaluate(capsys, "--reward-model", model, "--data", *VALIDATION)
    assert code == 0
    header = next(line for line in shown.splitlines() if "accuracy" in line)
    for column in ("set", "pairs", "accuracy", "95 % interval", "longer", "ECE", "similar"):
        assert column in header
    row = next(line for line in shown.splitlines() if "gsm8k_solutions" in line)
    assert row.count("%") >= 4
    assert "lost text" in shown


def test_pooling_counts_the_named_sources_only(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "--reward-model", model, "--data", *VALIDATION, "--pool", "oasst_en")
    assert found["pooled_sources"] == ["oasst_en"]
    code, printed, complaint = evaluate(capsys, "--reward-model", model, "--data", VALIDATION[0], "--pool", "mars")
    assert (code, printed) == (2, "")
    assert "--pool mars: no such source in the data; there are oasst_en" in complaint


def test_bad_input_is_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('\n{"prompt": "p", "completions": ["a", "b"], "ranks": [1]}\n', encoding="utf-8")
    tied = tmp_path / "tied.jsonl"
    tied.write_text('{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]}\n', encoding="utf-8")
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n', encoding="utf-8")
    cases: list[tuple[list[str | Path], str]] = [
        (["--reward-model", "unread", "--data", bad], f"{bad}:2: ranks: has 1 entries for 2 completions"),
        (["--reward-model", "unread", "--data", VALIDATION[0], bad], f"{bad}:2: ranks: "),
        (["--reward-model", "unread", "--data", tmp_path / "no.jsonl"], "no.jsonl: no such file"),
        (["--reward-model", "unread", "--data", tied], "no decided comparison"),
        (["--reward-model", tmp_path, "--data", VALIDATION[0]], "cannot load the reward model"),
        (["--reward-model", model, "--data", VALIDATION[0], "--baseline-data", few], "--baseline-data: "),
        (["--reward-model", model], "--data"),
    ]
    for arguments, problem in cases:
        code, printed, complaint = evaluate(capsys, *arguments)
        assert (code, printed) == (2, ""), arguments
        assert problem in complaint.splitlines()[-1]
        assert complaint.splitlines()[-1].startswith("winnow: ")


def test_skipped_records_are_counted(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"prompt": "p", "chosen": "aa", "rejected": "b"}\nno json\n', encoding="utf-8")
    found = report(capsys, "--reward-model", model, "--data", mixed, "--skip-invalid")
    assert found["skipped"] == 1
    assert {name: row["pairs"] for name, row in found["sets"].items()} == {"mixed": 1}
