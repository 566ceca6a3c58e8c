"""The store on SQLite and on PostgreSQL, with the same claims about both."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from feedback.judgements import Judgement, RefusedError, StoreError
from feedback.migrations import STEPS
from feedback.store import DatabaseStore
from tests.feedback.conftest import candidate_set

MakeStore = Callable[[], DatabaseStore]


def test_what_was_written_is_read_back(make_store: MakeStore) -> None:
    store = make_store()
    written = candidate_set()
    failed = replace(written.candidates[2], failed=True, valid=False, reason="The upstream broke off", reward=None)
    many = replace(written.candidates[1], std=0.5, objectives={"helpful": 1.5, "ünï": -2.0})
    written = replace(written, candidates=[written.candidates[0], many, failed])
    store.add_sets([written, candidate_set("winnow-2")])
    assert store.candidate_set("winnow-1") == written
    assert store.candidate_set("winnow-3") is None
    assert make_store().candidate_set("winnow-1") == written, "another process sees it"


def test_a_set_is_written_once(make_store: MakeStore) -> None:
    store = make_store()
    store.add_sets([candidate_set("winnow-1", "first", "second")])
    store.add_sets([candidate_set("winnow-1", "other"), candidate_set("winnow-2")])
    found = store.candidate_set("winnow-1")
    assert found is not None and [one.message["content"] for one in found.candidates] == ["first", "second"]
    assert store.candidate_set("winnow-2") is not None


def test_a_batch_is_written_whole_or_not_at_all(make_store: MakeStore) -> None:
    store = make_store()
    broken = replace(candidate_set("winnow-2"), route=None)  # type: ignore[arg-type]
    with pytest.raises(RefusedError):
        store.add_sets([candidate_set("winnow-1"), broken])
    assert store.candidate_set("winnow-1") is None


def test_a_nul_costs_a_batch_nothing(make_store: MakeStore) -> None:
    """Upstreams and models may send one; PostgreSQL refuses it in text, SQLite's tools end there."""
    store = make_store()
    broken = replace(candidate_set().candidates[0], valid=False, reason="a\0b", finish_reason="\0")
    said = replace(candidate_set().candidates[1], message={"role": "assistant", "content": "a\0b"})
    store.add_sets([replace(candidate_set(), candidates=[broken, said], model="m\0"), candidate_set("winnow-2")])
    store.add_judgement(Judgement("winnow-1", comment="\0"))
    ((found, (judgement,)),) = store.judged_sets()
    assert found.model == "m\ufffd" and judgement.judgement.comment == "\ufffd"
    assert (found.candidates[0].reason, found.candidates[0].finish_reason) == ("a\ufffdb", "\ufffd")
    assert found.candidates[1].message["content"] == "a\0b", "JSON holds it"
    assert store.candidate_set("winnow-2") is not None


def test_judgements_are_kept_in_order_and_repeats_are_known(make_store: MakeStore) -> None:
    store = make_store()
    store.add_sets([candidate_set()])
    said = [
        Judgement("winnow-1", rating=-1, annotator="a"),
        Judgement("winnow-1", ranking=[[2], [0, 1]], labels={"safe": True, "grade": 3}, comment="ünï"),
        Judgement("winnow-1", correction="better", preferred=1, annotator="b"),
    ]
    first = [store.add_judgement(one) for one in said]
    again = store.add_judgement(said[1])
    assert again.repeated and again.id == first[1].id
    ((found, judgements),) = store.judged_sets()
    assert found == candidate_set()
    assert [one.judgement for one in judgements] == said
    assert [one.id for one in judgements] == [one.id for one in first]


def test_a_judgement_may_come_before_its_set(make_store: MakeStore) -> None:
    store = make_store()
    store.add_judgement(Judgement("winnow-1", rating=1), candidate_set())
    store.add_sets([candidate_set()])
    assert store.candidate_set("winnow-1") == candidate_set()
    assert len(list(store.judged_sets())) == 1


def test_a_judgement_needs_a_set(make_store: MakeStore) -> None:
    with pytest.raises(StoreError):
        make_store().add_judgement(Judgement("winnow-none", rating=1))


def test_errors_hold_no_words_of_people(make_store: MakeStore) -> None:
    with pytest.raises(StoreError) as caught:
        make_store().add_judgement(Judgement("winnow-none", comment="secret-canary"))
    chain: BaseException | None = caught.value
    while chain is not None:
        assert "secret-canary" not in str(chain)
        chain = chain.__cause__


def test_many_writers_at_once(make_store: MakeStore) -> None:
    stores = [make_store() for _ in range(4)]
    failures: list[Exception] = []

    def write(number: int) -> None:
        try:
            for i in range(10):
                stores[number].add_sets([candidate_set(f"winnow-{number}-{i}"), candidate_set("winnow-shared")])
                stores[number].add_judgement(Judgement("winnow-shared", comment=f"{number} {i}"))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    ((_, judgements),) = stores[0].judged_sets()
    assert len(judgements) == 40


def test_opening_twice_at_once_migrates_once(database_url: str) -> None:
    stores = [DatabaseStore(database_url) for _ in range(4)]
    failures: list[Exception] = []

    def open_(store: DatabaseStore) -> None:
        try:
            store.open()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=open_, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    stores[0].add_sets([candidate_set()])
    for store in stores:
        assert store.candidate_set("winnow-1") is not None
        store.close()


def test_an_older_database_is_brought_up_to_date(make_store: MakeStore, database_url: str) -> None:
    make_store().add_sets([candidate_set()])
    engine = sa.create_engine(database_url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        for column in ("std", "objectives"):
            connection.execute(sa.text(f"ALTER TABLE candidates DROP COLUMN {column}"))
        connection.execute(sa.text("UPDATE winnow_schema SET version = 1"))
    engine.dispose()
    store = make_store()
    assert store.candidate_set("winnow-1") == candidate_set()
    by_head = replace(candidate_set().candidates[0], std=0.5, objectives={"helpful": 1.5})
    written = replace(candidate_set("winnow-2"), candidates=[by_head])
    store.add_sets([written])
    assert make_store().candidate_set("winnow-2") == written


def test_a_newer_database_is_refused(make_store: MakeStore, database_url: str) -> None:
    make_store()
    engine = sa.create_engine(database_url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE winnow_schema SET version = {len(STEPS) + 1}"))
    engine.dispose()
    with pytest.raises(StoreError, match="use a newer winnow"):
        make_store()


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("nonsense", "no database URL"),
        ("sqlite://", "names no file"),
        ("mysql://h/d", "mysql is not known"),
        ("sqlite+aiosqlite:///x", None),
    ],
)
def test_urls(url: str, problem: str | None) -> None:
    if problem is None:
        DatabaseStore(url).close()
        return
    with pytest.raises(ValueError, match=problem):
        DatabaseStore(url)


def test_a_store_that_is_away_says_so(tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path}/no/such/folder.db", f"postgresql://u:secret@/d?host={tmp_path}"):
        with pytest.raises(StoreError) as caught:
            DatabaseStore(url).open()
        assert "secret" not in str(caught.value)
        assert not isinstance(caught.value, RefusedError), "it may be there again soon"


def test_a_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    store = DatabaseStore(f"sqlite:///{tmp_path / 'feedback.db'}")
    store.open()
    store.add_sets([candidate_set()])
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
    store.close()


WRITER = """
import sys
from feedback.judgements import Judgement
from feedback.store import DatabaseStore
store = DatabaseStore(sys.argv[1])
store.open()
number = 0
while True:
    store.add_judgement(Judgement("winnow-1", comment=f"{sys.argv[2]} {number}"))
    print(number, flush=True)
    number += 1
"""


def test_kill_9_loses_nothing_acknowledged(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'feedback.db'}"
    store = DatabaseStore(url)
    store.open()
    store.add_sets([candidate_set()])
    acknowledged: set[str] = set()
    for run in range(5):
        command = [sys.executable, "-c", WRITER, url, str(run)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        assert writer.stdout is not None
        for _ in range(30 + 17 * run):
            acknowledged.add(f"{run} {writer.stdout.readline().strip()}")
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged |= {f"{run} {line.strip()}" for line in writer.communicate()[0].splitlines() if line.strip()}
    ((_, judgements),) = store.judged_sets()
    store.close()
    assert acknowledged <= {one.judgement.comment for one in judgements}
    with sqlite3.connect(tmp_path / "feedback.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
