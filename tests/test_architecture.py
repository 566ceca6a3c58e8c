"""The house rules that a machine can check: which way imports run, what importing costs, how files are named."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "feedback": frozenset[str](),
    "reward": frozenset({"feedback"}),
    "proxy": frozenset({"reward", "feedback"}),
    "training": frozenset({"reward", "feedback"}),
    "winnow": frozenset({"proxy", "training", "reward", "feedback"}),
}
"""winnow -> proxy, training -> reward -> feedback; proxy and training never meet."""

NO_HOME = {"utils", "util", "common", "helpers", "core", "misc"}

MAX_LINES = 400
LONG_FILES: dict[str, str] = {}
"""Files past `MAX_LINES`, each with the reason why it is one idea all the same."""

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "pyarrow", "sqlalchemy", "psycopg")

LIGHT_MODULES = [
    "proxy.app",
    "reward.batching",
    "reward.bases",
    "reward.local",
    "reward.manifest",
    "reward.rendering",
    "reward.scorer",
    "feedback.judgements",
    "feedback.jsonl",
    "feedback.rankings",
    "feedback.records",
    "feedback.redaction",
    "training.hosted.jobs",
    "winnow.__main__",
]
"""What a gateway with a remote scorer imports, or what others import without wanting a model."""


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


ALL_SOURCES = [path for room in MAY_IMPORT for path in sources(room)]


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, inside functions too."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            yield node.lineno, ".".join([*above, *([node.module] if node.module else [])])


def test_the_rooms_are_there() -> None:
    """Else the checks below would hold of nothing."""
    for room in MAY_IMPORT:
        assert len(sources(room)) > 1, room


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room: str) -> None:
    foreign = set(MAY_IMPORT) - MAY_IMPORT[room] - {room}
    broken = [
        f"{name_of(path)}:{line} imports {name}"
        for path in sources(room)
        for line, name in imported_names(path)
        if name.split(".")[0] in foreign
    ]
    assert not broken, f"{room} may import {sorted(MAY_IMPORT[room]) or 'no other room'}: {broken}"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_no_room_imports_the_tests(room: str) -> None:
    assert not [name_of(path) for path in sources(room) for _, name in imported_names(path) if name.startswith("tests")]


def test_init_files_are_empty() -> None:
    full = [name_of(path) for path in ALL_SOURCES if path.name == "__init__.py" and path.read_text(encoding="utf-8")]
    assert not full


def test_tests_are_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_file_has_a_noun_for_a_name() -> None:
    assert not [name_of(path) for path in ALL_SOURCES if NO_HOME & {path.stem, *path.relative_to(ROOT).parts[:-1]}]


def test_every_module_says_what_lives_in_it() -> None:
    silent = [
        name_of(path)
        for path in ALL_SOURCES
        if path.name != "__init__.py" and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


def test_a_long_file_has_a_reason() -> None:
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in ALL_SOURCES}
    long = {name for name, count in lines.items() if count > MAX_LINES}
    assert long == set(LONG_FILES), "past 400 lines a file holds two ideas, or a reason stands in LONG_FILES"


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_importing_costs_no_model_library(module: str) -> None:
    script = f"import sys, {module}; print(*sorted({set(HEAVY)!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
