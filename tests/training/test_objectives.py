"""Several objectives on one base: each learns from its own sources, and the rule can be changed when serving."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from feedback.records import Message, Messages
from proxy.config_loading import load_settings
from reward.errors import ModelLoadError
from reward.local import LocalScorer
from reward.metrics import ScoreMetrics
from reward.model import REFERENCES_FILE, RewardModel, load_reward_model
from reward.normalisation import Normalisation
from reward.objectives import LEAST_ACCEPTED, MOST_REFUSED, ObjectiveChoice
from reward.scorer import Score
from tests.training import tasks
from tests.training.conftest import GRADIENT, POOLED, Task
from tests.training.test_batches import encoded
from training.batches import flatten
from training.objectives import own_rewards, rewards_by_own_heads, with_objectives
from training.options import OptionsError
from training.reward_model import train_reward_model
from winnow.parts import make_parts

OBJECTIVES = {"french": ["zig"], "idle": ["zag"]}
"""The one wants a word that the other one's worse completions hold."""
SETTINGS: dict[str, dict[str, Any]] = {
    "head": {**POOLED, "objectives": OBJECTIVES, "floors": {"idle": "p50"}},
    "lora": {**GRADIENT, **POOLED, "tuning": "lora", "objectives": OBJECTIVES, "floors": {"idle": "p50"}},
}
PROMPT: Messages = [{"role": "user", "content": "zig one two"}]
ANSWERS: list[list[Message]] = [
    [{"role": "assistant", "content": text}]
    for text in ("A one France two", "A one lazy two", "A France lazy two", "A four five six", "A lazy lazy lazy")
]


@pytest.fixture(scope="module")
def folder_of(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The reward model that each way of tuning gives, trained once."""
    home = tmp_path_factory.mktemp("objectives")

    def train(tuning: str) -> Path:
        if not (home / tuning).exists():
            files = [task.train, task.opposite_train], [task.validation, task.opposite_validation]
            train_reward_model(tasks.options(task.decoder, home / tuning, *files, **SETTINGS[tuning]))
        return home / tuning / "model"

    return train


def load(folder: Path, **choice: Any) -> RewardModel:
    objectives = ObjectiveChoice(**choice) if choice else None
    return load_reward_model(str(folder), device="cpu", objectives=objectives)


def scores(model: RewardModel) -> list[Score]:
    items = [model.renderer.render(PROMPT, answer) for answer in ANSWERS]
    return [model.manifest.score(raw, item) for raw, item in zip(model.raw_scores(items), items, strict=True)]


def expected(score: Score, wanted: str, floors: dict[str, float]) -> float:
    """The rule, once more, on what is served."""
    assert score.objectives is not None
    missed = max([floor - score.objectives[name] for name, floor in floors.items()], default=0.0)
    assert score.objectives[wanted] > -3, "these answers need no squeezing"
    return score.objectives[wanted] if missed <= 0 else MOST_REFUSED - missed


@pytest.mark.parametrize("tuning", SETTINGS)
def test_each_head_learns_its_sources_on_a_scale_of_its_own(
    tuning: str, folder_of: Callable[[str], Path], task: Task
) -> None:
    model = load(folder_of(tuning))
    assert list(model.manifest.objectives) == ["french", "idle"]
    files = {"french": task.validation, "idle": task.opposite_validation}
    for number, (name, about) in enumerate(model.manifest.objectives.items()):
        rewards = []
        for prompt, better, worse in tasks.completion_pairs(files[name]):
            items = [model.renderer.render(prompt, one) for one in (better, worse)]
            rewards += [about.normalisation.reward(raw.by_head[number]) for raw in model.raw_scores(items)]
        mean = math.fsum(rewards) / len(rewards)
        assert mean == pytest.approx(0.0, abs=1e-4)
        assert math.fsum((r - mean) ** 2 for r in rewards) / len(rewards) == pytest.approx(1.0, abs=1e-4)
        assert about.num_references == len(rewards)
        right = sum(better > worse for better, worse in zip(rewards[::2], rewards[1::2], strict=True))
        assert about.accuracy is not None
        assert about.accuracy.accuracy == right / len(rewards) * 2 > 0.9
    card = (folder_of(tuning) / "README.md").read_text(encoding="utf-8")
    assert "| idle | zag |" in card and "The one reward is 1 × french" in card


@pytest.mark.parametrize("tuning", SETTINGS)
def test_the_one_reward_is_the_wanted_objective_above_the_floor(tuning: str, folder_of: Callable[[str], Path]) -> None:
    model = load(folder_of(tuning))
    rule = model.manifest.rule
    assert rule is not None and dict(rule.weights) == {"french": 1.0} and list(rule.floors) == ["idle"]
    found = scores(model)
    for score in found:
        assert score.reward == score.raw_reward == pytest.approx(expected(score, "french", dict(rule.floors)), abs=1e-5)
    met = [score.objectives is not None and score.objectives["idle"] >= rule.floors["idle"] for score in found]
    assert len(set(met)) == 2, "some miss the floor"
    assert all((score.reward > LEAST_ACCEPTED) is is_met for score, is_met in zip(found, met, strict=True))
    # Half of the references of one objective lie under the floor; nearly all of the other's do.
    quantiles = model.manifest.normalisation.quantiles
    assert quantiles[20] < LEAST_ACCEPTED < quantiles[95]


def test_a_server_can_choose_another_rule(folder_of: Callable[[str], Path], task: Task) -> None:
    folder = folder_of("head")
    for choice, wanted, floors in (
        ({"floors": {}}, "french", {}),
        ({"floors": {"idle": 0.5}}, "french", {"idle": 0.5}),
        ({"weights": {"idle": 3.0}, "floors": {"french": -0.5}}, "idle", {"french": -0.5}),
    ):
        model = load(folder, **choice)
        for score in scores(model):
            assert score.reward == pytest.approx(expected(score, wanted, floors), abs=1e-5)
        rewards = []
        for file in (task.validation, task.opposite_validation):
            for prompt, better, worse in tasks.completion_pairs(file):
                rewards += model.raw_rewards([model.renderer.render(prompt, one) for one in (better, worse)])
        again = Normalisation.with_quantiles_of(rewards).quantiles
        assert model.manifest.normalisation.quantiles == pytest.approx(again, abs=1e-4)


async def test_the_settings_reach_the_scorer(folder_of: Callable[[str], Path]) -> None:
    reward = {"model": str(folder_of("head")), "floors": {"idle": "p90"}, "objective_weights": {"idle": 1.0}}
    settings = load_settings(flags={"reward": reward, "device": "cpu"})
    scorer = make_parts(settings, ScoreMetrics(CollectorRegistry())).parts.scorers["default"]
    plain = LocalScorer(str(folder_of("head")), device="cpu")
    try:
        await scorer.start()
        await plain.start()
        ours, own = await scorer.score(PROMPT, ANSWERS), await plain.score(PROMPT, ANSWERS)
    finally:
        await scorer.aclose()
        await plain.aclose()
    floor = load(folder_of("head")).manifest.objectives["idle"].normalisation.at_percentile(90)
    assert floor is not None
    for score, before in zip(ours, own, strict=True):
        assert score.objectives == pytest.approx(before.objectives)
        assert score.reward == pytest.approx(expected(score, "idle", {"idle": floor}), abs=1e-4)


def test_a_probe_beside_a_floor_does_not_keep_a_model_out(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """In half precision its reward would jump by several deviations."""
    folder = Path(shutil.copytree(folder_of("head"), tmp_path / "model"))
    record = json.loads((folder / "reward.json").read_text(encoding="utf-8"))
    scale = load(folder).manifest.objective_scales["idle"]
    for probe in record["probes"]:
        record["rule"]["floors"]["idle"] = scale.reward(probe["by_head"][1]) + 1e-7
        (folder / "reward.json").write_text(json.dumps(record), encoding="utf-8")
        load_reward_model(str(folder), device="cpu", dtype="bfloat16")
    record["probes"][0]["by_head"][1] += scale.std
    (folder / "reward.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ModelLoadError, match="probe 0 scores"):
        load(folder)


def test_a_rule_that_cannot_be_is_refused_on_load(folder_of: Callable[[str], Path], tmp_path: Path, task: Task) -> None:
    folder = Path(shutil.copytree(folder_of("head"), tmp_path / "model"))
    with pytest.raises(ModelLoadError, match=r"floors\.honest: no such objective; there are french, idle"):
        load(folder, floors={"honest": 0.0})
    (folder / REFERENCES_FILE).unlink()
    with pytest.raises(ModelLoadError, match="percentiles under another rule are made from it"):
        load(folder, floors={})
    single = tasks.options(task.decoder, tmp_path / "single", [task.train], **POOLED)
    with pytest.raises(ModelLoadError, match="are for a reward model with several objectives"):
        load(train_reward_model(single), floors={})


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"objectives": {"one": ["zig"]}}, "objectives: give two or more"),
        ({"gated": True}, "gated: not with objectives"),
        ({"last_token_export": True}, "last_token_export: not with objectives"),
        ({"heads": 3}, "heads: not with objectives"),
        ({"tuning": "full", "pooling": ["last"]}, "no objectives"),
        ({"floors": {"honest": 0.0}}, r"floors\.honest: no such objective; there are french, idle"),
        ({"floors": {"idle": "least"}}, r"floors\.idle: 'least' must be a number or a percentile"),
        ({"objective_weights": {"honest": 1.0}}, r"objective_weights\.honest: no such objective"),
        ({"objectives": {"french": ["zig"], "idle": ["lost"]}}, "none has the source 'zag' of train"),
        ({"objectives": {**OBJECTIVES, "lost": ["lost"]}}, r"objectives\.lost: train holds no comparison of lost"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], problem: str, task: Task, tmp_path: Path) -> None:
    chosen = {**SETTINGS["head"], **settings}
    files = [task.train, task.opposite_train], [task.validation]
    with pytest.raises(OptionsError, match=problem):
        train_reward_model(tasks.options(task.decoder, tmp_path / "run", *files, **chosen))
    assert not (tmp_path / "run" / "model").exists()


def test_a_group_counts_as_one_shared_by_its_objectives() -> None:
    groups = [encoded([1, 2]), encoded([3, 4])]
    both = {"a": [groups[0].source], "b": [groups[0].source, "other"], "c": ["other"]}
    weighted = with_objectives(groups, both)
    assert [group.head_weights for group in weighted] == [(1.5, 1.5, 0.0)] * 2
    assert with_objectives(groups, {}) == groups
    rewards = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0], [5.0, 6.0, 9.0], [7.0, 8.0, 9.0]])
    batch = flatten(weighted)
    assert rewards_by_own_heads(rewards, batch).tolist() == [1.5, 3.5, 5.5, 7.5]
    assert own_rewards(weighted, rewards.tolist()) == [1.5, 3.5, 5.5, 7.5]


def test_micro_batches_do_not_change_a_step(task: Task, tmp_path: Path) -> None:
    logs = []
    for tokens in (1, 100_000):
        run = tmp_path / str(tokens)
        chosen = {**SETTINGS["lora"], "epochs": 0.5, "micro_batch_tokens": tokens, "learning_rate": 3e-3}
        train_reward_model(tasks.options(task.decoder, run, [task.train, task.opposite_train], **chosen))
        logs.append(tasks.read_log(run))
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert logs[0][0]["loss"] == pytest.approx(math.log(2), abs=0.3)
