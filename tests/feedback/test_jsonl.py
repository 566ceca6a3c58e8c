from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.jsonl import DataError, Skipped, read_records, replacing, write_records
from feedback.records import parse_demonstration, parse_preference, parse_prompt, parse_ranking

USER = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "Because."}
CALL = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": '{"a": null}'}}]}
PREFERENCES: list[dict[str, Any]] = [
    {"prompt": [USER], "chosen": [GOOD], "rejected": [CALL], "margin": 0.5, "id": "1"},
    {"prompt": [USER, GOOD, USER], "chosen": [CALL], "rejected": [GOOD], "source": "web"},
]


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def write_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    columns = {name: None for record in records for name in record}
    table = pyarrow.Table.from_pydict({name: [record.get(name) for record in records] for name in columns})
    pyarrow.parquet.write_table(table, path)
    return path


def test_all_three_formats_hold_the_same_records(tmp_path: Path) -> None:
    plain, packed = tmp_path / "p.jsonl", tmp_path / "p.jsonl.gz"
    assert write_records(plain, PREFERENCES) == write_records(packed, PREFERENCES) == 2
    assert packed.read_bytes()[:2] == b"\x1f\x8b"
    parquet = write_parquet(tmp_path / "p.parquet", PREFERENCES)
    expected = [parse_preference(record) for record in PREFERENCES]
    for path in (plain, packed, parquet):
        assert list(read_records([path], parse_preference)) == expected
    assert list(read_records([plain, parquet], parse_preference)) == expected * 2


def test_a_column_that_is_null_in_one_file_and_a_struct_in_another_does_no_harm(tmp_path: Path) -> None:
    bare = {"prompt": None, "messages": [USER, GOOD], "completion": None}
    full = {"prompt": [USER], "messages": None, "completion": [GOOD]}
    one, other = write_parquet(tmp_path / "1.parquet", [bare]), write_parquet(tmp_path / "2.parquet", [full])
    mixed = write_parquet(tmp_path / "3.parquet", [bare, full])
    lines = write_lines(tmp_path / "4.jsonl", json.dumps(bare), json.dumps(full))
    parsed = list(read_records([one, other, mixed, lines], parse_demonstration))
    assert len(parsed) == 6
    assert all((record.prompt, record.completion) == ([USER], [GOOD]) for record in parsed)


def test_a_bad_record_is_named_by_file_line_and_field(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", '{"prompt": "p"}', "", '{"prompt": [{"role": "x"}]}')
    with pytest.raises(DataError, match=r"r\.jsonl:3: prompt\[0\]\.role: 'x' is not one of"):
        list(read_records([path], parse_prompt))
    parquet = write_parquet(tmp_path / "r.parquet", [{"prompt": "p"}, {"prompt": ""}])
    with pytest.raises(DataError, match=r"r\.parquet:2: prompt: is empty"):
        list(read_records([parquet], parse_prompt))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{broken", "column 2: Expecting property name"),
        ("[1]", "record: must be a JSON object"),
        ("null", "record: must be a JSON object"),
        ('{"prompt": ' + "9" * 5000 + "}", "record: cannot be decoded"),
        ('{"prompt": ' + "[" * 200_000, "record: cannot be decoded"),
    ],
    ids=["not JSON", "list", "null", "huge number", "deep"],
)
def test_a_line_that_is_no_record_stops_or_is_counted(tmp_path: Path, line: str, problem: str) -> None:
    path = write_lines(tmp_path / "r.jsonl", line, '{"prompt": "p"}')
    with pytest.raises(DataError) as caught:
        list(read_records([path], parse_prompt))
    assert str(caught.value).startswith(f"{path}:1: {problem}")
    skipped = Skipped()
    assert len(list(read_records([path], parse_prompt, skipped))) == 1
    assert skipped.count == 1
    assert skipped.examples == [str(caught.value)]


def test_skipping_counts_all_and_shows_the_first_few(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", *(["{}"] * 7), '{"prompt": "p"}')
    skipped = Skipped()
    assert len(list(read_records([path, path], parse_prompt, skipped))) == 2
    assert skipped.count == 14
    assert len(skipped.examples) == 5
    assert skipped.examples[0] == f"{path}:1: prompt: is missing"


def test_records_come_one_by_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", '{"prompt": "p"}', "{broken")
    records = read_records([path], parse_prompt)
    assert next(records).prompt == [{"role": "user", "content": "p"}]
    with pytest.raises(DataError):
        next(records)


def truncated_gzip() -> bytes:
    return gzip.compress(b'{"prompt": "p"}\n' * 100, mtime=0)[:-12]


def damaged_gzip() -> bytes:
    packed = bytearray(gzip.compress(bytes(range(256)) * 50, mtime=0))
    packed[20:40] = b"\xff" * 20
    return bytes(packed)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", truncated_gzip()),
        ("damaged.jsonl.gz", damaged_gzip()),
        ("not.jsonl.gz", b"plain"),
        ("latin.jsonl", '{"prompt": "é"}'.encode("latin-1")),
        ("not.parquet", b"PAR1 or not"),
    ],
)
def test_a_file_that_cannot_be_read_stops_even_when_skipping(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_records([path], parse_prompt, Skipped()))
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        list(read_records([tmp_path / "none.jsonl"], parse_prompt))


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path, name: str) -> None:
    def failing() -> Iterator[Mapping[str, Any]]:
        yield {"prompt": "new"}
        raise RuntimeError("the source broke")

    path = tmp_path / "deep" / name
    with pytest.raises(RuntimeError, match="the source broke"):
        write_records(path, failing())
    assert list(path.parent.iterdir()) == []
    write_records(path, [{"prompt": "old"}])
    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        write_records(path, failing())
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == before


def test_the_target_appears_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with replacing(path) as partial:
        partial.write_text("whole", encoding="utf-8")
        assert partial.parent == path.parent
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "whole"
    assert not partial.exists()
    assert path.stat().st_mode & 0o777 == 0o644


def test_json_lines_are_not_written_under_the_name_of_another_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"name the file \.jsonl"):
        write_records(tmp_path / "out.parquet", [])


@given(
    st.lists(
        st.tuples(st.text(min_size=1), st.lists(st.tuples(st.text(min_size=1), st.integers(1, 4)), min_size=2)),
        max_size=5,
    )
)
def test_any_text_survives_the_disk(tmp_path_factory: pytest.TempPathFactory, data: list[Any]) -> None:
    """Line separators of every kind included: they are escaped or kept, never a new line."""
    records = [
        {"prompt": prompt, "completions": [text for text, _ in ranked], "ranks": [rank for _, rank in ranked]}
        for prompt, ranked in data
    ]
    path = tmp_path_factory.mktemp("disk") / "r.jsonl.gz"
    write_records(path, records)
    assert list(read_records([path], parse_ranking)) == [parse_ranking(record) for record in records]
