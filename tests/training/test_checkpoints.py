"""Checkpoints are whole or absent; what was random goes on as if nothing had happened. Logs fit their checkpoint."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from tests.training import tasks
from training import checkpoints
from training.checkpoints import (
    load_checkpoint,
    random_state,
    restore_random_state,
    resume_training,
    save_checkpoint,
    save_training,
)
from training.loop import start_accelerator
from training.runlog import RunLog


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_newest_comes_back(tmp_path: Path) -> None:
    for step in (5, 10):
        save_checkpoint(tmp_path, step, {"weights": {"w": torch.full((2,), float(step))}})
    state = load_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 10
    assert state["weights"]["w"].tolist() == [10.0, 10.0]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "absent") is None
    assert load_checkpoint(tmp_path) is None


def test_two_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 11, 1000):
        save_checkpoint(tmp_path, step, {})
    assert names(tmp_path) == ["step-0000011", "step-0001000"]


def test_a_failing_save_leaves_the_old_ones_alone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"value": 1})
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save_checkpoint(tmp_path, 2, {"value": lambda: None})
    assert names(tmp_path) == ["step-0000001"]
    state = load_checkpoint(tmp_path)
    assert state == {"step": 1, "value": 1}


def test_a_checkpoint_holds_no_code(tmp_path: Path) -> None:
    class Malice:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "done"),)

    folder = tmp_path / f"{checkpoints.PREFIX}0000001"
    folder.mkdir()
    torch.save({"step": 1, "weights": Malice()}, folder / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "done").exists()


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    random.seed(1)
    torch.manual_seed(1)
    random.gauss(0, 1)  # leaves a second number waiting inside
    save_checkpoint(tmp_path, 1, {"random": [random_state()]})
    expected = (random.gauss(0, 1), random.random(), torch.rand(3).tolist())
    state = load_checkpoint(tmp_path)
    assert state is not None
    restore_random_state(state["random"][0])
    assert (random.gauss(0, 1), random.random(), torch.rand(3).tolist()) == expected


class Line(nn.Linear):
    """A model that is all trained."""

    def trainable_state(self) -> dict[str, Tensor]:
        return self.state_dict()

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        self.load_state_dict(state)


class Run:
    """A run of gradient steps in fp16, whose losses are scaled; on a CPU, which has the scaler all the same."""

    def __init__(self, *, scaled: bool = True) -> None:
        self.model = Line(2, 1)
        self.optimizer = AdamW(self.model.parameters())
        self.schedule = LambdaLR(self.optimizer, lambda step: 1.0)
        self.accelerator: Accelerator = start_accelerator(tasks.options("base", Path("run"), [], device="cpu"))
        self.scaler = torch.amp.GradScaler("cpu", growth_interval=3)
        self.accelerator.scaler = self.scaler if scaled else None

    def step(self, factor: float = 1.0) -> None:
        loss = self.model(torch.ones(1, 2)).sum() * factor
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def save(self, run: Path) -> None:
        save_training(self.accelerator, self.model, self.optimizer, self.schedule, 5, [], run)

    def resume(self, run: Path) -> None:
        assert resume_training(self.accelerator, self.model, self.optimizer, self.schedule, run) == (5, [])


def test_the_loss_scale_of_fp16_goes_on_where_it_was(tmp_path: Path) -> None:
    unbroken, resumed = Run(), Run()
    for factor in (1.0, math.inf, 1.0, 1.0):
        unbroken.step(factor)
    assert unbroken.scaler.get_scale() == 2.0**15, "halved once, and two steps from growing"
    unbroken.save(tmp_path)
    resumed.resume(tmp_path)
    for run in (unbroken, resumed):
        run.step()
    assert resumed.scaler.state_dict() == unbroken.scaler.state_dict()
    assert resumed.scaler.get_scale() == 2.0**16


def test_runs_without_a_loss_scale_resume_too(tmp_path: Path) -> None:
    Run(scaled=False).save(tmp_path)
    Run(scaled=False).resume(tmp_path)


def test_a_resumed_log_drops_what_will_be_done_again(tmp_path: Path) -> None:
    with RunLog(tmp_path, active=True) as log:
        for step in (1, 2, 3):
            log.metrics(step, {"loss": step / 10})
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    with RunLog(tmp_path, active=True, resumed_step=2) as log:
        kept = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["step"] for line in kept] == [1, 2], "whatever happens from here on"
        log.metrics(3, {"loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": 0.5}]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", active=False) as log:
        log.metrics(1, {"loss": 1.0})
        log.task("training", total=3).advance(note="half way")
        log.note("hello")
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    with RunLog(tmp_path, active=True) as log:
        log.metrics(1, {"loss": 0.25})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.stat().st_size > 0
