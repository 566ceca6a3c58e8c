"""One step is one step, however its batch is cut up: over micro-batches, and over processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training import tasks
from tests.training.conftest import Task
from training.checkpoints import load_checkpoint
from training.options import OptionsError, RewardOptions
from training.reward_model import train_reward_model

LORA: dict[str, Any] = {"tuning": "lora", "learning_rate": 3e-3, "lora": {"dropout": 0.0}}


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_micro_batches_do_not_change_a_step(tuning: str, task: Task, tmp_path: Path) -> None:
    logs = []
    for tokens in (1, 300, 100_000):
        run = tmp_path / str(tokens)
        settings = {**LORA, "tuning": tuning, "global_batch_size": 10, "epochs": 1.0, "micro_batch_tokens": tokens}
        train_reward_model(tasks.options(task.decoder, run, [task.rankings, task.train], **settings))
        logs.append(tasks.read_log(run))
    for log in logs[1:]:
        for name in ("loss", "grad_norm", "accuracy", "tokens"):
            assert [line[name] for line in log] == pytest.approx([line[name] for line in logs[0]], rel=1e-5), name


def on_two_processes(chosen: RewardOptions, home: Path) -> Path:
    config = tasks.write_config(home / "config.yaml", chosen)
    launched("-m", "winnow", "train", "reward", "--config", str(config))
    return Path(chosen.output)


def launched(*arguments: str) -> None:
    """Runs a module or a script in two processes."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        env=tasks.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr


def test_two_processes_train_the_same_adapter(task: Task, tmp_path: Path) -> None:
    """Also with a last batch of one prompt, and with held-out data that fit one batch: one process has no part."""

    def options(name: str) -> RewardOptions:
        train = tasks.write_rankings(tmp_path / "train.jsonl", 9, seed=6)
        validation = tasks.write_preferences(tmp_path / "validation.jsonl", 6, seed=7)
        settings = {**LORA, "global_batch_size": 4, "epochs": 3.0, "eval_every": 2, "save_every": 2}
        return tasks.options(task.decoder, tmp_path / name, [train], [validation], **settings)

    run = on_two_processes(options("two"), tmp_path)
    train_reward_model(options("one"))
    ours, theirs = tasks.read_log(tmp_path / "one"), tasks.read_log(run)
    assert len(ours) == len(theirs) == 9 + 5
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    weights, others = (load_file(folder / "model" / "adapter_model.safetensors") for folder in (tmp_path / "one", run))
    assert all(torch.allclose(weights[name], others[name], atol=1e-5) for name in weights)
    state = load_checkpoint(run / "checkpoints")
    assert state is not None
    first, second = state["random"]
    assert not torch.equal(first["torch"], second["torch"]), "dropout would hide the same units on both"


SHARDED: dict[str, dict[str, Any]] = {
    "full": {"tuning": "full", "weight_decay": 0.1},
    "ensemble": {**LORA, "heads": 3, "layers": [1, 2], "micro_batch_tokens": 150},
}


def test_two_processes_with_a_shard_each_train_the_same_models(task: Task, tmp_path: Path) -> None:
    """Some steps give one process more micro-batches than the other; validations have one batch in all."""
    train = tasks.write_rankings(tmp_path / "train.jsonl", 9, seed=6)
    validation = tasks.write_preferences(tmp_path / "validation.jsonl", 6, seed=7)
    steps = {"learning_rate": 3e-3, "global_batch_size": 4, "epochs": 2.0, "eval_every": 2, "save_every": 2}

    def options(kind: str, sharding: str) -> RewardOptions:
        chosen = {**steps, **SHARDED[kind], "sharding": sharding}
        return tasks.options(task.decoder, tmp_path / f"{kind}-{sharding}", [train], [validation], **chosen)

    files = [tasks.write_config(tmp_path / f"{kind}.yaml", options(kind, "fsdp2")) for kind in SHARDED]
    launched(str(Path(__file__).parent / "train_several.py"), *map(str, files))
    for kind in SHARDED:
        train_reward_model(options(kind, "none"))
        one, two = tmp_path / f"{kind}-none", tmp_path / f"{kind}-fsdp2"
        ours, theirs = tasks.read_log(one), tasks.read_log(two)
        assert len(ours) == len(theirs) == 6 + 3
        for mine, shared in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(shared, rel=1e-5)
        assert_same_folders(one / "model", two / "model")
        assert_same_checkpoints(one / "checkpoints", two / "checkpoints")


def assert_same_folders(one: Path, two: Path) -> None:
    for file in one.glob("*.safetensors"):
        weights, others = load_file(file), load_file(two / file.name)
        assert weights.keys() == others.keys()
        assert all(torch.allclose(weights[name], others[name], atol=1e-5) for name in weights), file.name


def assert_same_checkpoints(one: Path, two: Path) -> None:
    mine, shared = load_checkpoint(one), load_checkpoint(two)
    assert mine is not None and shared is not None
    for name, weight in mine["weights"].items():
        assert weight.shape == shared["weights"][name].shape, "whole weights"
        # Comparisons leave a head's zero open: rounding moves it, and it is centred at the end.
        assert name == "head.members.bias" or torch.allclose(weight, shared["weights"][name], atol=1e-5), name
    for number, state in mine["optimizer"]["state"].items():
        assert torch.allclose(state["exp_avg"], shared["optimizer"]["state"][number]["exp_avg"], atol=1e-5)


def test_a_frozen_base_is_not_sharded(task: Task, tmp_path: Path) -> None:
    chosen = tasks.options(task.decoder, tmp_path / "run", [task.train], sharding="fsdp2")
    with pytest.raises(OptionsError, match="sharding: needs tuning: lora or full"):
        train_reward_model(chosen)


def test_two_processes_fit_the_same_head(task: Task, tmp_path: Path) -> None:
    def options(name: str) -> RewardOptions:
        return tasks.options(
            task.decoder,
            tmp_path / name,
            [task.train, task.opposite_train],
            [task.validation],
            pooling=["last", "mean"],
            gated=True,
        )

    run = on_two_processes(options("two"), tmp_path)
    train_reward_model(options("one"))
    weights, others = (load_file(folder / "model" / "head.safetensors") for folder in (tmp_path / "one", run))
    assert all(torch.allclose(weights[name], others[name], atol=1e-5) for name in weights)
