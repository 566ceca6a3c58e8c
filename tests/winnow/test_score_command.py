"""`winnow score`: the same rewards as everywhere else, as a table, as JSON and as a file."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from reward.model import load_reward_model
from tests.fakes.models import build_tiny_causal_lm
from training.options import RewardOptions
from training.reward_model import train_reward_model
from winnow.__main__ import run

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Tiny models are much slower on several, the more so when the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock classifier, trained for a few steps on real data."""
    home = tmp_path_factory.mktemp("score")
    options = RewardOptions(
        base=str(build_tiny_causal_lm(home / "base")),
        output=str(home / "run"),
        train=[str(DATA / "oasst_preferences.train.jsonl.gz")],
        validation=[str(DATA / "oasst_preferences.validation.jsonl.gz")],
        tuning="full",
        learning_rate=1e-3,
        global_batch_size=16,
        max_length=256,
        device="cpu",
        name="tiny",
    )
    return train_reward_model(options)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    lines = [
        {"id": "first", "prompt": "What is two and two?", "completions": ["Four.", "It is five, I think.", "4"]},
        {"prompt": [{"role": "user", "content": "Hello!"}], "completion": "Hello, how are you? [bold]good[/bold]"},
        {"prompt": "Tell me much. " * 200, "completion": "A tale."},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def score(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exited:
        run(["score", "--device", "cpu", *(str(argument) for argument in arguments)])
    assert isinstance(exited.value.code, int)
    return exited.value.code


def scored(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_scores_are_the_models_and_transformers_own(model: Path, records: Path, tmp_path: Path) -> None:
    """Within 1e-4 of a direct, unbatched forward pass plus the manifest's scale."""
    assert score("--reward-model", model, records, "-o", tmp_path / "out.jsonl") == 0
    ours = load_reward_model(str(model), device="cpu")
    theirs = AutoModelForSequenceClassification.from_pretrained(model).eval()
    scale = ours.manifest.normalisation
    for record in scored(tmp_path / "out.jsonl"):
        for completion, raw, reward, percentile in zip(
            record["completions"], record["raw_rewards"], record["rewards"], record["percentiles"], strict=True
        ):
            item = ours.renderer.render(record["prompt"], completion)
            assert ours.raw_rewards([item]) == pytest.approx([raw], abs=1e-4)
            with torch.no_grad():
                direct = theirs(input_ids=torch.tensor([item.ids])).logits[0, 0].item()
            assert scale.reward(direct) == pytest.approx(reward, abs=1e-4)
            assert scale.percentile(reward) == pytest.approx(percentile)


def test_records_come_back_in_order_with_what_they_had(model: Path, records: Path, tmp_path: Path) -> None:
    assert score("--reward-model", model, records, "-o", tmp_path / "deep" / "out.jsonl.gz") == 0
    with gzip.open(tmp_path / "deep" / "out.jsonl.gz", "rt", encoding="utf-8") as file:
        first, second, third = (json.loads(line) for line in file)
    assert first["id"] == "first"
    assert first["prompt"] == [{"role": "user", "content": "What is two and two?"}]
    assert [len(r["rewards"]) for r in (first, second, third)] == [3, 1, 1]
    assert first["truncated"] == [False] * 3
    assert third["truncated"] == [True]
    assert first["reward_model"] == "tiny"


def test_batches_do_not_change_scores(
    model: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for tokens in ("1", "100000"):
        assert score("--reward-model", model, records, "--json", "--max-batch-tokens", tokens) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        found.append([reward for line in lines for reward in line["rewards"]])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_the_table_marks_the_best_and_shows_text_as_it_is(
    model: Path, records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score("--reward-model", model, records) == 0
    shown = capsys.readouterr().out
    assert shown.count("★") == 1
    assert "percentile" in shown
    assert "[bold]good[/bold]" in shown, "markup in completions means nothing"


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("{", "column "),
        ('{"prompt": "p"}', "completion: is missing"),
        ('{"prompt": "p", "completions": ["a", 3]}', "completions[1]: "),
        ('{"prompt": [{"role": "king", "content": "x"}], "completion": "a"}', "prompt[0].role: "),
    ],
)
def test_a_bad_record_is_one_line_and_writes_nothing(
    line: str, where: str, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with records.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    assert score("--reward-model", "unread", records, "-o", tmp_path / "out.jsonl") == 2
    captured = capsys.readouterr()
    (message,) = captured.err.splitlines()
    assert message.startswith(f"winnow: {records}:4: {where}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_without_a_file_records_come_from_standard_input(
    model: Path, records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def piped(text: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
        code = score("--reward-model", model, "--json")
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    text = records.read_text(encoding="utf-8")
    code, shown, _ = piped(text)
    assert code == 0
    assert score("--reward-model", model, records, "--json") == 0
    assert capsys.readouterr().out == shown
    code, shown, complaint = piped(text + "{}\n")
    assert (code, shown) == (2, "")
    assert "stdin:4: prompt: is missing" in complaint


def test_bad_records_can_be_skipped(model: Path, records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with records.open("a", encoding="utf-8") as file:
        file.write("no json\n")
    assert score("--reward-model", model, records, "--json", "--skip-invalid") == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert "skipped 1 bad records" in captured.err
    assert f"{records}:4" in captured.err.replace("\n", "")


def test_what_cannot_be_scored_is_one_line(
    model: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[list[str | Path], str]] = [
        (["--reward-model", model, tmp_path / "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--reward-model", tmp_path, records], "cannot load the reward model"),
        (["--reward-model", model, records, "-o", tmp_path / "out.parquet"], "out.parquet: "),
        (["--reward-model", model, records, "--dtype", "float3"], "'float3' is not a dtype"),
    ]
    for arguments, problem in cases:
        assert score(*arguments) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("winnow: ")
        assert problem in message
    assert not (tmp_path / "out.parquet").exists()
