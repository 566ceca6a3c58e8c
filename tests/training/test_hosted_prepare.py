"""`prepare`: whole files or none, what repeats itself, what it will cost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from feedback.jsonl import DataError
from tests.fakes.models import build_tiny_causal_lm
from training.hosted.counting import MESSAGE_TOKENS
from training.hosted.options import HostedOptions
from training.hosted.prepare import check_files, load_prepared, prepare
from training.hosted.record import JobRecord, Made
from training.hosted.services import SERVICES
from training.options import OptionsError

DATA = Path(__file__).parent.parent / "data"


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def pairs(start: int, end: int) -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(start, end)]


def options(folder: Path, **settings: Any) -> HostedOptions:
    given = {"provider": "openai", "method": "dpo", "model": "m", "output": str(folder / "out"), **settings}
    if "train" not in given:
        given["train"] = [write(folder / "train.jsonl", pairs(0, 12))]
    return HostedOptions.model_validate(given)


def test_what_is_written_is_what_was_checked(tmp_path: Path) -> None:
    validation = write(tmp_path / "validation.jsonl", pairs(20, 23))
    prepared = prepare(options(tmp_path, validation=[validation]))
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == ["prepared.json", "train.jsonl", "validation.jsonl"]
    raw = (folder / "train.jsonl").read_bytes()
    assert raw.endswith(b"}\n")
    assert len(raw.splitlines()) == prepared.train.num_rows == 12
    assert len(raw) == prepared.train.size_bytes
    again = load_prepared(folder)
    assert again == prepared
    check_files(again)
    (folder / "train.jsonl").write_bytes(raw + raw)
    with pytest.raises(OptionsError, match=r"train\.jsonl: was changed after it was checked"):
        check_files(again)


def test_a_run_is_named_by_what_shapes_the_job(tmp_path: Path) -> None:
    base = options(tmp_path, beta=0.5)
    run = prepare(base, dry_run=True).run
    for same in ({"poll_s": 1}, {"output": "elsewhere"}, {"dollars_per_million_tokens": 1}, {"skip_invalid": True}):
        assert prepare(base.model_copy(update=same), dry_run=True).run == run
    for other in ({"beta": 0.25}, {"model": "n"}, {"seed": 1}, {"base_url": "https://h/v1"}):
        assert prepare(base.model_copy(update=other), dry_run=True).run != run
    more = write(tmp_path / "more.jsonl", pairs(0, 13))
    assert prepare(base.model_copy(update={"train": [more]}), dry_run=True).run != run


def test_bad_records_are_named_and_leave_nothing_behind(tmp_path: Path) -> None:
    train = write(tmp_path / "bad.jsonl", [*pairs(0, 12), {"prompt": "p", "chosen": " ", "rejected": "b"}])
    with pytest.raises(DataError, match=r"bad\.jsonl:13: chosen\[0\]\.content: is empty"):
        prepare(options(tmp_path, train=[train]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]
    prepared = prepare(options(tmp_path, train=[train], skip_invalid=True))
    assert (prepared.train.num_rows, prepared.train.num_skipped) == (12, 1)
    assert "bad.jsonl:13: chosen[0].content" in prepared.train.skipped[0]


def test_repeated_rows_and_prompts_in_both_files_are_named_with_their_twin(tmp_path: Path) -> None:
    twice = write(tmp_path / "twice.jsonl", [*pairs(0, 12), *pairs(3, 4)])
    with pytest.raises(DataError, match=r"twice\.jsonl:13: record: says the same as .*twice\.jsonl:4"):
        prepare(options(tmp_path, train=[twice]))
    overlapping = [write(tmp_path / "v.jsonl", [*pairs(20, 22), {"prompt": "p5", "chosen": "x", "rejected": "y"}])]
    with pytest.raises(DataError, match=r"v\.jsonl:3: prompt: is trained on too \(.*train\.jsonl:6\)"):
        prepare(options(tmp_path, validation=overlapping))
    prepared = prepare(options(tmp_path, train=[twice], validation=overlapping, skip_invalid=True))
    assert prepared.validation is not None
    assert (prepared.train.num_rows, prepared.train.num_skipped) == (12, 1)
    assert (prepared.validation.num_rows, prepared.validation.num_skipped) == (2, 1)


def test_contradictions_are_counted_and_kept(tmp_path: Path) -> None:
    turned = [{"prompt": "p0", "chosen": "bad 0", "rejected": "good 0"}]
    prepared = prepare(options(tmp_path, train=[write(tmp_path / "t.jsonl", pairs(0, 12) + turned)]))
    assert (prepared.train.num_rows, prepared.train.num_contradictions) == (13, 1)


def test_a_providers_limits_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [write(tmp_path / "few.jsonl", pairs(0, 9))]
    with pytest.raises(DataError, match="9 rows; openai takes no fewer than 10"):
        prepare(options(tmp_path, train=few))
    prepare(options(tmp_path, train=few, provider="fireworks", account="me"), dry_run=True)
    service = SERVICES["fireworks"]
    for limits, problem in (
        ({"max_file_bytes": 500}, "larger than the 0 MiB that fireworks takes"),
        ({"max_rows": 5}, "more rows than the 5 that fireworks takes"),
    ):
        narrow = replace(service, rules=replace(service.rules, **limits))
        monkeypatch.setitem(SERVICES, "fireworks", narrow)  # type: ignore[arg-type]  # a dictionary under its type
        with pytest.raises(DataError, match=problem):
            prepare(options(tmp_path, train=few, provider="fireworks", account="me"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"provider": "nebius"}, "method: nebius offers no dpo"),
        ({"learning_rate": 1e-5}, "learning_rate: openai takes none"),
        ({"provider": "together", "learning_rate_multiplier": 2}, "learning_rate_multiplier: together takes none"),
        ({"provider": "fireworks", "account": "me", "seed": 1}, "seed: fireworks takes none"),
        ({"provider": "fireworks"}, "account: fireworks needs"),
        ({"provider": "fireworks", "account": "me", "validation": ["v"]}, "validation: fireworks takes none for dpo"),
        ({"provider": "azure"}, "base_url: azure has none of its own"),
        ({"method": "sft", "beta": 0.1}, "beta: is a setting of method: dpo"),
        ({"provider": "together", "suffix": "x" * 41}, "suffix: together takes at most 40 characters"),
        ({"max_dollars": 1}, "max_dollars: needs dollars_per_million_tokens"),
        ({"tokenizer": "no/such-tokenizer"}, "tokenizer: cannot load no/such-tokenizer"),
    ],
)
def test_settings_that_a_provider_does_not_know_are_refused(
    settings: dict[str, Any], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Read once, when the library is imported: the variable would come too late, and a lookup is tried for a minute.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OptionsError) as refused:
        prepare(options(tmp_path, **settings))
    assert problem in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_the_key_does_not_travel_in_clear_text() -> None:
    given = {"provider": "openai", "model": "m", "train": ["t"], "output": "o"}
    for url in ("http://127.0.0.1:8000/v1", "http://localhost/v1/", "https://host/v1"):
        assert HostedOptions.model_validate(given | {"base_url": url}).base_url == url.rstrip("/")
    with pytest.raises(ValueError, match="use https"):
        HostedOptions.model_validate(given | {"base_url": "http://host/v1"})


def test_tokens_are_estimated_or_counted_and_priced(tmp_path: Path) -> None:
    record = {"prompt": "x" * 400, "chosen": "y" * 80, "rejected": "é" * 40}
    train = [write(tmp_path / "t.jsonl", [record | {"prompt": f"{i:02}" + "x" * 398} for i in range(10)])]
    conversation = 100 + 20 + 2 * MESSAGE_TOKENS
    priced = options(tmp_path, train=train, epochs=3, dollars_per_million_tokens=25)
    prepared = prepare(priced, dry_run=True)
    assert prepared.train.longest_tokens == conversation, "by bytes, so é counts twice"
    assert prepared.train.tokens == 10 * 2 * conversation
    assert prepared.dollars == pytest.approx(3 * 10 * 2 * conversation * 25 / 1e6)
    with pytest.raises(OptionsError, match=r"max_dollars: 3 passes over 2560 tokens come to about 0\.19 dollars"):
        prepare(priced.model_copy(update={"max_dollars": 0.1}))
    assert not (tmp_path / "out").exists()
    tokenizer = str(build_tiny_causal_lm(tmp_path / "base"))
    counted = prepare(options(tmp_path, train=train, tokenizer=tokenizer), dry_run=True)
    assert counted.train.tokens not in (0, prepared.train.tokens)
    assert counted.dollars is None


def test_tools_are_counted(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look", "description": "x" * 4000, "parameters": {}}}]
    plain = prepare(options(tmp_path), dry_run=True)
    more = [one | {"tools": tools} for one in pairs(0, 10)]
    told = prepare(options(tmp_path, train=[write(tmp_path / "tools.jsonl", more)]), dry_run=True)
    assert told.train.tokens - plain.train.tokens > 2 * 10 * 1000


def test_what_was_sent_is_remembered_when_the_same_is_prepared_again(tmp_path: Path) -> None:
    first = prepare(options(tmp_path))
    assert first.folder is not None
    sent = JobRecord(first.run, train=Made("done", "file-1"))
    sent.save(first.folder)
    prepare(options(tmp_path))
    assert JobRecord.load(tmp_path / "out") == sent
    assert not list(tmp_path.glob(".out-*"))


def test_a_folder_is_prepared_again_until_a_job_was_asked_for(tmp_path: Path) -> None:
    first = prepare(options(tmp_path, beta=0.1))
    assert first.folder is not None
    JobRecord(first.run, train=Made("done", "file-1")).save(first.folder)
    second = prepare(options(tmp_path, beta=0.2))
    assert load_prepared(tmp_path / "out").run == second.run != first.run
    assert JobRecord.load(tmp_path / "out") is None, "what was sent belongs to other settings"
    JobRecord(second.run, job=Made("asked")).save(tmp_path / "out")
    with pytest.raises(OptionsError, match="has a job already"):
        prepare(options(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(OptionsError, match="holds other things"):
        prepare(options(tmp_path, output=str(tmp_path / "other")))
    assert (tmp_path / "other" / "thesis.tex").exists()


@pytest.mark.parametrize("provider", ["openai", "azure", "together", "fireworks"])
def test_real_comparisons_become_pairs_everywhere(provider: str, tmp_path: Path) -> None:
    given = {"base_url": "https://host/v1", "account": "me"}
    files = [str(DATA / name) for name in ("oasst_rankings.train.jsonl.gz", "gsm8k_preferences.validation.jsonl.gz")]
    prepared = prepare(options(tmp_path, provider=provider, train=files, skip_invalid=True, **given))
    assert prepared.train.num_rows > 100
    for line in (tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert set(row) == {"input", "preferred_output", "non_preferred_output"}
        assert row["preferred_output"] != row["non_preferred_output"]
