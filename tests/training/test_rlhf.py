"""The loop from start to end: rounds, a report, stops at any stage, people who rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from feedback.jsonl import read_records
from feedback.judgements import Judgement
from feedback.records import parse_completions
from feedback.store import DatabaseStore
from tests.fakes.models import build_tiny_causal_lm
from tests.training import policy_tasks, rlhf_tasks
from training.options import OptionsError
from training.rlhf import Finished, Tools, train_rlhf
from training.rlhf_options import RlhfOptions
from training.rlhf_rankings import AwaitingPeopleError, set_id
from winnow.commands.rlhf_drawing import drawer


class Stopped(BaseException):
    """Stands for a kill, at the beginning of a stage."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_causal_lm(tmp_path_factory.mktemp("base"), spread=1.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def unbroken(base: Path, home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path, list[str]]:
    """A run of two rounds, and the stages it went through."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    expected = {"sft_lowers_loss": True, "reward_model_beats_length": True, "score_gain": 50.0, "max_kl": 1e6}
    stages: list[str] = []
    chosen = rlhf_tasks.options(home, base, run, expect=expected)
    return train_rlhf(chosen, Tools(drawer("cpu"), say=stages.append)), run, stages


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_folder_tells_the_story(unbroken: tuple[Finished, Path, list[str]]) -> None:
    _, run, stages = unbroken
    for number in (1, 2):
        folder = run / f"round-{number}"
        samples, rankings = lines(folder / "samples.jsonl"), lines(folder / "rankings.jsonl")
        assert [len(one["completions"]) for one in samples] == [3] * 6  # type: ignore[arg-type]
        assert [one["prompt"] for one in rankings] == [one["prompt"] for one in samples]
        assert all(one["source"] == f"round-{number}" for one in rankings)
        assert {path.name for path in folder.iterdir()} == {
            "samples.jsonl", "rankings.jsonl", "reward", "ppo-0", "ppo-1", "answers.jsonl", "evaluation.json",
        }  # fmt: skip
    drawn = [{json.dumps(one["prompt"]) for one in lines(run / f"round-{n}" / "samples.jsonl")} for n in (1, 2)]
    assert not drawn[0] & drawn[1], "each round asks prompts that had no turn yet"
    assert AutoModelForCausalLM.from_pretrained(run / "policy").config.vocab_size
    assert json.loads((run / "reward-model" / "reward.json").read_text())["name"]
    assert sum("PPO" in stage for stage in stages) == 4


def test_a_reward_model_learns_old_and_new_comparisons(unbroken: tuple[Finished, Path, list[str]]) -> None:
    _, run, _ = unbroken
    files = json.loads((run / "round-2" / "reward" / "options.json").read_text())["train"]
    assert [Path(file).name for file in files] == ["preferences.jsonl", "rankings.jsonl", "rankings.jsonl"]


def test_a_round_goes_on_from_the_best_policy_of_the_last(unbroken: tuple[Finished, Path, list[str]]) -> None:
    _, run, _ = unbroken
    started = json.loads((run / "round-2" / "ppo-0" / "options.json").read_text())["base"]
    rewards = {}
    for seed in (0, 1):
        logged = lines(run / "round-1" / f"ppo-{seed}" / "log.jsonl")
        rewards[seed] = [line["eval_reward"] for line in logged if "eval_reward" in line][-1]
    best = max(rewards, key=lambda seed: rewards[seed])  # type: ignore[arg-type, return-value]
    assert started == str(run / "round-1" / f"ppo-{best}" / "policy")


def test_policies_are_held_against_the_ones_before(unbroken: tuple[Finished, Path, list[str]]) -> None:
    _, run, _ = unbroken
    found = json.loads((run / "round-2" / "evaluation.json").read_text())
    assert found["models"] == ["round 2", "round 1"]
    assert found["prompts"] == 7, "as many as were asked for"
    assert found["judge"] == "tests.training.ppo_tasks:letters"
    assert 0 <= found["win_rate"]["low"] <= found["win_rate"]["value"] <= found["win_rate"]["high"] <= 1


def test_the_report_says_what_was_expected_and_what_came(unbroken: tuple[Finished, Path, list[str]]) -> None:
    finished, run, _ = unbroken
    page = (run / "report.html").read_text(encoding="utf-8")
    assert finished.report == run / "report.html"
    assert page.count("data:image/svg+xml") == 4  # fine-tuning, win rates, PPO twice
    assert "PPO raises the held-out score by 50 in every seed" in page
    unmet = [one.what for one in finished.unmet if "length" not in one.what and "longer" not in one.what]
    assert unmet == [f"round {number}: PPO raises the held-out score by 50 in every seed" for number in (1, 2)]
    for story in ("fine-tuning lowers the held-out loss", "round 2: the reward model beats", "round 1: at an exact KL"):
        assert story in page
    assert "<script" not in page and "http://" not in page


def test_stopped_at_every_stage_it_ends_the_same(
    unbroken: tuple[Finished, Path, list[str]], base: Path, home: Path, tmp_path: Path
) -> None:
    _, whole, stages = unbroken
    run = tmp_path / "run"
    chosen = rlhf_tasks.options(home, base, run)
    begun: set[str] = set()

    def stop(stage: str) -> None:
        place = stage.replace(str(run), "")
        if place not in begun:
            begun.add(place)
            raise Stopped

    for _ in stages:
        with pytest.raises(Stopped):
            train_rlhf(chosen, Tools(drawer("cpu"), say=stop))
    train_rlhf(chosen, Tools(drawer("cpu"), say=stop))
    assert len(begun) == len(stages)
    for name in ("round-1/rankings.jsonl", "round-2/rankings.jsonl"):
        assert (run / name).read_text() == (whole / name).read_text()
    ours, theirs = (load_file(folder / "policy" / "model.safetensors") for folder in (run, whole))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_finished_run_is_not_begun_again(unbroken: tuple[Finished, Path, list[str]], base: Path, home: Path) -> None:
    with pytest.raises(OptionsError, match="finished run"):
        train_rlhf(rlhf_tasks.options(home, base, unbroken[1]), Tools(drawer("cpu")))


def short(home: Path, base: Path, run: Path, **more: object) -> RlhfOptions:
    """One round, one seed, no fine-tuning."""
    return rlhf_tasks.options(home, base, run, rounds=1, ppo_seeds=[0], sft=None, **more)


def test_it_waits_for_peoples_files(base: Path, home: Path, tmp_path: Path) -> None:
    run, ranked = tmp_path / "run", tmp_path / "people-1.jsonl"
    chosen = short(home, base, run, rank={"files": [str(tmp_path / "people-{round}.jsonl")], "min_new": 2})
    with pytest.raises(AwaitingPeopleError, match=r"round 1 has 0 new rankings of the 2 .*people-1\.jsonl"):
        train_rlhf(chosen, Tools(drawer("cpu")))
    judged = [{**one, "ranks": [2, 1, 2]} for one in lines(run / "round-1" / "samples.jsonl")]
    ranked.write_text("".join(json.dumps(one) + "\n" for one in judged), encoding="utf-8")
    train_rlhf(chosen, Tools(drawer("cpu")))
    assert [one["ranks"] for one in lines(run / "round-1" / "rankings.jsonl")] == [[2, 1, 2]] * 6


def test_it_learns_what_people_said_in_the_store(base: Path, home: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'feedback.db'}"
    chosen = short(home, base, tmp_path / "run", rank={"database": url})
    with pytest.raises(AwaitingPeopleError, match="feedback store"):
        train_rlhf(chosen, Tools(drawer("cpu")))
    with pytest.raises(AwaitingPeopleError):
        train_rlhf(chosen, Tools(drawer("cpu")))  # the sets are put there once
    store = DatabaseStore(url)
    store.open()
    try:
        drawn = list(read_records([tmp_path / "run" / "round-1" / "samples.jsonl"], parse_completions))
        offered = [store.candidate_set(set_id(one)) for one in drawn]
        assert [one is not None and len(one.candidates) for one in offered] == [3] * 6
        told = lines(tmp_path / "run" / "round-1" / "to-judge.jsonl")
        assert [one["completion_id"] for one in told] == [set_id(one) for one in drawn]
        assert url not in (tmp_path / "run" / "options.json").read_text(encoding="utf-8")
        store.add_judgement(Judgement(set_id(drawn[0]), preferred=1))
    finally:
        store.close()
    train_rlhf(chosen, Tools(drawer("cpu")))
    (ranking,) = lines(tmp_path / "run" / "round-1" / "rankings.jsonl")
    assert sorted(ranking["ranks"]) == [1, 2, 2]  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"rank": {}}, "rank: name one of gold, files and database, not 0"),
        ({"ppo": {"learning_rat": 1.0}}, r"ppo\.learning_rat: no such setting; did you mean learning_rate"),
        ({"ppo": {"reward": {"model": "default"}}}, r"ppo\.reward: follows from the loop"),
        ({"reward": {"train": "a.jsonl"}}, r"reward\.train: "),
        ({"sft": None, "start": "sft"}, "start: there is no sft"),
        ({"rank": {"gold": {"function": "nosuch:fn"}}}, r"rank\.gold\.function: 'nosuch:fn' cannot be found"),
        ({"rank": {"database": "feedback.db"}}, r"rank\.database: names no database"),
    ],
)
def test_settings_are_refused_before_anything_is_written(
    more: dict[str, object], problem: str, base: Path, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionsError, match=problem):
        train_rlhf(rlhf_tasks.options(home, base, tmp_path / "run", **more), Tools(drawer("cpu")))
    assert not (tmp_path / "run").exists()


def test_two_processes_go_through_the_loop_as_one_does(base: Path, home: Path, tmp_path: Path) -> None:
    def chosen(name: str) -> RlhfOptions:
        return rlhf_tasks.options(home, base, tmp_path / name, rounds=1, ppo_seeds=[0])

    one = policy_tasks.on_one_process("rlhf", chosen("one"))
    two = policy_tasks.on_two_processes("rlhf", chosen("two"))
    for file in ("answers.jsonl", "round-1/samples.jsonl", "round-1/rankings.jsonl", "round-1/answers.jsonl"):
        # The name of the model that drew is the path of its run.
        ours, theirs = ([{**record, "model": None} for record in lines(run / file)] for run in (one, two))
        assert ours == theirs, file
    assert (two / "report.html").is_file() and (two / "reward-model").is_dir()
    weights, others = policy_tasks.saved_weights(one), policy_tasks.saved_weights(two)
    assert all(torch.allclose(weights[name], others[name], atol=2e-4) for name in weights)
