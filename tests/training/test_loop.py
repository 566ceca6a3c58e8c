"""Schedule, optimizer groups, and what the launcher promised."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training import tasks
from training.loop import build_optimizer, build_schedule, schedule_factor, start_accelerator
from training.options import OptionsError, RewardOptions


def options(**more: Any) -> RewardOptions:
    return tasks.options("base", Path("run"), [Path("train.jsonl")], **more)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.5),  # two steps of warm-up: 1/2, 2/2
        (1, 1.0),
        (2, 1.0),  # the cosine starts at its top
        (6, 0.55),  # half way: the mean of 1 and 0.1
        (8, 0.1 + 0.9 * 0.5 * (1 + math.cos(0.75 * math.pi))),
        (10, 0.1),
        (99, 0.1),
    ],
)
def test_schedule_by_hand(step: int, factor: float) -> None:
    assert schedule_factor(step, 10, warmup_share=0.2, final_share=0.1) == pytest.approx(factor)


def test_no_warm_up_starts_at_the_peak_and_one_step_is_enough() -> None:
    assert schedule_factor(0, 10, 0.0, 0.0) == 1.0
    assert schedule_factor(0, 1, 0.0, 0.1) == 1.0


def test_the_schedule_never_rises_after_warm_up() -> None:
    factors = [schedule_factor(step, 50, 0.1, 0.2) for step in range(60)]
    assert factors[:5] == sorted(factors[:5])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert all(0.2 - 1e-12 <= factor <= 1 for factor in factors[4:])


class Network(nn.Module):
    """Matrices, vectors, a frozen part and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 1)


def test_the_head_has_its_own_rate_and_vectors_do_not_decay() -> None:
    network = Network()
    optimizer = build_optimizer(network, options(learning_rate=1e-4, weight_decay=0.1), head_rate=1e-2)
    settings = {
        id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert settings == {
        id(network.backbone.weight): (1e-4, 0.1),
        id(network.backbone.bias): (1e-4, 0.0),
        id(network.head.weight): (1e-2, 0.1),
        id(network.head.bias): (1e-2, 0.0),
    }


def test_without_a_rate_of_its_own_the_head_takes_the_common_one() -> None:
    optimizer = build_optimizer(Network(), options(learning_rate=3e-4))
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}


def test_the_scheduler_follows_the_factor_for_every_group() -> None:
    optimizer = build_optimizer(Network(), options(learning_rate=1.0, warmup_share=0.5), head_rate=10.0)
    schedule = build_schedule(optimizer, 4, options(warmup_share=0.5))
    rates = set()
    for step in range(4):
        factor = schedule_factor(step, 4, 0.5, 0.1)
        rates.add(factor)
        assert sorted(set(schedule.get_last_lr())) == pytest.approx([factor, 10 * factor])
        optimizer.step()
        schedule.step()
    assert len(rates) > 2


def test_a_launcher_whose_promise_is_not_kept_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    start_accelerator(options())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionsError, match="promised 2 processes, accelerate runs 1"):
        start_accelerator(options())


def test_a_launcher_that_starts_one_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --cpu --num_processes 2` sets: it would quietly train on half of each batch."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    start_accelerator(options())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(OptionsError, match="asked for several processes and started one"):
        start_accelerator(options())


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharding_that_would_not_happen_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start_accelerator(options())
    monkeypatch.setenv(variable, "true")
    with pytest.raises(OptionsError, match=f"{variable} asks for sharding"):
        start_accelerator(options())


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(OptionsError, match=r"device: .*'nonsense'"):
        start_accelerator(options(device="nonsense"))


def test_training_on_the_cpu_is_in_full_precision() -> None:
    accelerator = start_accelerator(options())
    assert accelerator.device == torch.device("cpu")
    assert accelerator.mixed_precision == "no"
