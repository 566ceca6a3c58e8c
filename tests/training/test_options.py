"""Settings from a file, the command line and the environment; and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.options import OptionsError, RewardOptions, load_options

MINIMAL = "train: [a.jsonl]\noutput: runs/first\n"


def load(folder: Path, text: str, *overrides: str) -> RewardOptions:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_options(RewardOptions, path, overrides)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(OptionsError) as caught:
        load(folder, text, *overrides)
    return str(caught.value)


def test_defaults_fill_what_the_file_leaves_out(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL)
    assert loaded.train == ["a.jsonl"]
    assert loaded.lora.rank == 8
    assert loaded.tuning == "head"


def test_a_run_folder_may_be_named_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert load(tmp_path, MINIMAL, "output=~/runs/first").output == "/home/ann/runs/first"


def test_overrides_win_and_reach_below(tmp_path: Path) -> None:
    loaded = load(
        tmp_path, MINIMAL + "lora: {rank: 4, alpha: 2}\n", "lora.rank=16", "seed=7", "train=[b.jsonl, c.jsonl]"
    )
    assert (loaded.lora.rank, loaded.lora.alpha) == (16, 2.0)
    assert loaded.seed == 7
    assert loaded.train == ["b.jsonl", "c.jsonl"]


def test_overrides_make_sections_that_the_file_does_not_have(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "head_fit.l2=[1e-3]").head_fit.l2 == [1e-3]


@pytest.mark.parametrize(("written", "meant"), [("1e-5", 1e-5), ("2E-4", 2e-4), ("1.5e3", 1500.0), ("3", 3.0)])
def test_powers_of_ten_are_numbers(tmp_path: Path, written: str, meant: float) -> None:
    assert load(tmp_path, MINIMAL, f"learning_rate={written}").learning_rate == meant
    assert load(tmp_path, MINIMAL + f"learning_rate: {written}\n").learning_rate == meant


def test_a_name_that_looks_like_a_number_may_be_text(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "name='1e-5 run'").name == "1e-5 run"


def test_the_environment_fills_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_FOLDER", "/data")
    monkeypatch.delenv("NOT_SET", raising=False)
    text = "train: ['${SOME_FOLDER}/a.jsonl', '${NOT_SET:-here}/b.jsonl', '${NOT_SET:-}c']\noutput: out\n"
    assert load(tmp_path, text).train == ["/data/a.jsonl", "here/b.jsonl", "c"]


def test_a_missing_variable_is_named_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    message = refusal(tmp_path, "train: ['${NOT_SET}/a']\noutput: out\n")
    assert message == f"{tmp_path / 'config.yaml'}: the environment variable NOT_SET is not set"


def test_an_unknown_setting_gets_its_nearest_neighbour(tmp_path: Path) -> None:
    assert refusal(tmp_path, MINIMAL + "learnin_rate: 1\n").endswith(
        "config.yaml: learnin_rate: no such setting; did you mean learning_rate?"
    )
    assert "lora.rnk: no such setting; did you mean rank?" in refusal(tmp_path, MINIMAL, "lora.rnk=3")
    assert refusal(tmp_path, MINIMAL, "xyzzy=3").endswith("xyzzy: no such setting")


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("epochs=0", "epochs: "),
        ("tuning=some", "tuning: "),
        ("lora.dropout=1", "lora.dropout: "),
        ("max_length=many", "max_length: "),
        ("head_fit.folds=1", "head_fit.folds: "),
    ],
)
def test_a_wrong_value_is_named_with_file_and_setting(tmp_path: Path, override: str, where: str) -> None:
    assert refusal(tmp_path, MINIMAL, override).startswith(f"{tmp_path / 'config.yaml'}: {where}")


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    assert "output: Field required" in refusal(tmp_path, "train: [a]\n")


@pytest.mark.parametrize("text", ["[1, 2]", "just text", "a: [unclosed"])
def test_files_that_are_no_settings_are_refused(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, text).startswith(f"{tmp_path / 'config.yaml'}: ")


def test_an_empty_file_misses_its_settings(tmp_path: Path) -> None:
    assert "output: Field required" in refusal(tmp_path, "")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"nowhere\.yaml: No such file"):
        load_options(RewardOptions, tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("override", ["seed", "=3", "seed.below=3", "name=[unclosed"])
def test_overrides_that_cannot_be_meant_are_refused(tmp_path: Path, override: str) -> None:
    assert refusal(tmp_path, MINIMAL + "seed: 1\n", override).startswith(f"--set {override}: ")


def test_every_setting_has_its_explanation() -> None:
    def undocumented(kind: type) -> list[str]:
        return [name for name, field in kind.model_fields.items() if not field.description]  # type: ignore[attr-defined]

    assert undocumented(RewardOptions) == []
