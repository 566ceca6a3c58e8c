"""Drawing for many prompts: what is asked, what is kept, what a killed run leaves, which failures end it."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from feedback.jsonl import DataError, Skipped
from feedback.records import Messages
from training.sampling import Draft, Drawn, GenerationError, Outcome, Sampling, Task, draw_all, read_tasks

SAMPLING = Sampling(count=2, temperature=0.7)


def write(path: Path, *questions: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in questions), encoding="utf-8")
    return path


def tasks_in(folder: Path, *questions: str) -> list[Task]:
    return read_tasks([write(folder / "prompts.jsonl", *questions)])


def question(prompt: Messages) -> str:
    return str(prompt[-1]["content"])


class Echo:
    """Answers with the question. `before` may fail or wait."""

    def __init__(self, before: Callable[[str], None] = lambda asked: None) -> None:
        self.asked: list[str] = []
        self.running = self.most_running = 0
        self._before = before

    async def __call__(self, prompt: Messages, count: int, seed: int | None) -> list[Drawn]:
        self.asked.append(question(prompt))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(0)  # lets the others begin
        self.running -= 1
        self._before(question(prompt))
        said = [f"{question(prompt)} {index}" for index in range(count)]
        own = [None if seed is None else seed + index for index in range(count)]
        return [
            Drawn([{"role": "assistant", "content": text}], "stop", one) for text, one in zip(said, own, strict=True)
        ]


def draw(
    tasks: Sequence[Task], echo: Echo, output: Path, sampling: Sampling = SAMPLING, at_once: int = 1, in_a_row: int = 3
) -> Outcome:
    with Draft(output, tasks, sampling) as draft:
        missing = draft.begin("m")
        outcome = asyncio.run(
            draw_all(missing, echo, sampling, draft.keep, at_once=at_once, max_failures_in_a_row=in_a_row)
        )
        if not outcome.failures:
            draft.finish(draft.records())
    return outcome


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_records_come_in_the_order_of_the_prompts_with_what_made_them(tmp_path: Path) -> None:
    tasks = tasks_in(tmp_path, "a", "b", "c", "d", "e")
    echo = Echo()
    draw(tasks, echo, tmp_path / "out.jsonl", at_once=3)
    assert echo.most_running == 3
    found = records(tmp_path / "out.jsonl")
    assert [question(one["prompt"]) for one in found] == ["a", "b", "c", "d", "e"]
    assert found[0] == {
        "prompt": [{"role": "user", "content": "a"}],
        "completions": [[{"role": "assistant", "content": "a 0"}], [{"role": "assistant", "content": "a 1"}]],
        "finish_reasons": ["stop", "stop"],
        "model": "m",
        "sampling": {"count": 2, "temperature": 0.7},
    }
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_seeds_go_with_the_prompt_and_not_with_its_place(tmp_path: Path) -> None:
    seeded = Sampling(count=2, seed=7)
    seeds = []
    for number, questions in enumerate((["a", "b", "a"], ["new", "a", "b", "a"])):
        (tmp_path / str(number)).mkdir()
        draw(tasks_in(tmp_path / str(number), *questions), Echo(), tmp_path / str(number) / "out.jsonl", seeded)
        seeds.append([one["seeds"] for one in records(tmp_path / str(number) / "out.jsonl")])
    first, moved = seeds
    assert first == moved[1:]
    assert len({seed for pair in first for seed in pair}) == 6, "a prompt that stands there twice is drawn for twice"
    assert all(pair[1] == pair[0] + 1 for pair in first)


def test_a_run_goes_on_where_it_was_killed_and_drops_the_torn_line(tmp_path: Path) -> None:
    def die(asked: str) -> None:
        if asked == "c":
            raise KeyboardInterrupt

    tasks = tasks_in(tmp_path, "a", "b", "c", "d")
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with pytest.raises(KeyboardInterrupt):
        draw(tasks, Echo(die), output)
    assert not output.exists()
    assert [question(one["prompt"]) for one in records(partial)] == ["a", "b"]
    with partial.open("a", encoding="utf-8") as file:
        file.write('{"key": "x", "prom')
    echo = Echo()
    draw(tasks, echo, output)
    assert echo.asked == ["c", "d"]
    assert [question(one["prompt"]) for one in records(output)] == ["a", "b", "c", "d"]


def test_more_prompts_are_added_to_a_finished_file_and_none_is_asked_again(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl.gz"
    draw(tasks_in(tmp_path, "a", "b"), Echo(), output)
    echo = Echo()
    draw(tasks_in(tmp_path, "new", "b", "a", "b"), echo, output)
    assert echo.asked == ["new", "b"]
    with gzip.open(output, "rt", encoding="utf-8") as file:
        assert [question(json.loads(line)["prompt"]) for line in file] == ["new", "b", "a", "b"]
    draw(tasks_in(tmp_path, "new", "b", "a", "b"), none := Echo(), output)
    assert none.asked == []


def test_a_kill_while_a_finished_file_is_taken_over_loses_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    draw(tasks_in(tmp_path, "a", "b", "c"), Echo(), output)
    more = tasks_in(tmp_path, "a", "b", "c", "d")
    with Draft(output, more, SAMPLING) as draft:
        draft.begin("m")
        first, *_ = draft.path.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "out.jsonl.partial").write_text(first, encoding="utf-8")
    draw(more, echo := Echo(), output)
    assert echo.asked == ["d"]
    assert [question(one["prompt"]) for one in records(output)] == ["a", "b", "c", "d"]


def test_half_a_character_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    file = write(tmp_path / "prompts.jsonl", "fine", "half \ud83d")
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: prompt: holds half a character"):
        read_tasks([file])
    assert len(read_tasks([file], Skipped())) == 1


@pytest.mark.parametrize(
    ("sampling", "questions", "problem"),
    [
        (Sampling(count=3, temperature=0.7), ["a"], "was drawn with another sampling"),
        (SAMPLING, ["b"], "holds a prompt that is not asked for"),
    ],
)
def test_what_others_drew_is_not_mixed_in(
    sampling: Sampling, questions: list[str], problem: str, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    draw(tasks_in(tmp_path, "a"), Echo(), output)
    before = output.read_bytes()
    with pytest.raises(DataError, match=rf"out\.jsonl:1: {problem}"):
        draw(tasks_in(tmp_path, *questions), Echo(), output, sampling)
    assert output.read_bytes() == before
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_draft_of_more_prompts_loses_none_of_them(tmp_path: Path) -> None:
    draw(tasks_in(tmp_path, "a", "b", "c"), failing("c"), tmp_path / "out.jsonl")
    partial = tmp_path / "out.jsonl.partial"
    before = partial.read_bytes()
    with pytest.raises(DataError, match=r"out\.jsonl\.partial:2: holds a prompt that is not asked for"):
        draw(tasks_in(tmp_path, "a"), Echo(), tmp_path / "out.jsonl")
    assert partial.read_bytes() == before


def test_a_draft_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.partial").write_text('{"prompt": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"out\.jsonl\.partial:1: not what this command writes"):
        draw(tasks_in(tmp_path, "a"), Echo(), tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="JSON lines"):
        draw(tasks_in(tmp_path, "a"), Echo(), tmp_path / "out.parquet")


def failing(*names: str, hopeless: bool = False) -> Echo:
    def fail(asked: str) -> None:
        if asked in names:
            raise GenerationError(f"no {asked}", hopeless=hopeless)

    return Echo(fail)


def test_a_failing_prompt_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    tasks = tasks_in(tmp_path, "a", "b", "c", "d")
    outcome = draw(tasks, failing("b"), tmp_path / "out.jsonl")
    assert [(one.place, one.problem) for one in outcome.failures] == [(f"{tmp_path / 'prompts.jsonl'}:2", "no b")]
    assert outcome.not_asked == 0
    assert not (tmp_path / "out.jsonl").exists(), "not whole"
    echo = Echo()
    draw(tasks, echo, tmp_path / "out.jsonl")
    assert echo.asked == ["b"]


def test_a_run_ends_after_so_many_failures_in_a_row(tmp_path: Path) -> None:
    tasks = tasks_in(tmp_path, *"abcdefgh")
    outcome = draw(tasks, failing("a", "c", "d", "e"), tmp_path / "out.jsonl")
    assert [one.problem for one in outcome.failures] == ["no a", "no c", "no d", "no e"]
    assert outcome.not_asked == 3


def test_a_hopeless_failure_ends_it_at_once(tmp_path: Path) -> None:
    outcome = draw(tasks_in(tmp_path, *"abcdef"), failing("b", hopeless=True), tmp_path / "out.jsonl")
    assert (len(outcome.failures), outcome.not_asked) == (1, 4)


def test_nothing_is_left_behind_where_nothing_came(tmp_path: Path) -> None:
    draw(tasks_in(tmp_path, "a"), failing("a"), tmp_path / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl"]
