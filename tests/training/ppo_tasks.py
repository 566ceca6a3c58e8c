"""A tiny policy with something to learn from rewards, as files, options and models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from feedback.records import Messages
from training.ppo_options import PpoOptions
from training.ppo_parts import PpoParts, build_parts


def letters(prompts: Sequence[Messages], completions: Sequence[str]) -> list[float]:
    """Share of small letters: about a quarter to begin with, and easy to raise."""
    return [sum("a" <= sign <= "z" for sign in text) / max(len(text), 1) for text in completions]


def broken(prompts: Sequence[Messages], completions: Sequence[str]) -> list[float]:
    """A score that is no number."""
    return [float("nan"), *letters(prompts, completions)[1:]]


def write_prompts(path: Path, count: int) -> Path:
    words = ("one", "two", "three", "four", "five")
    records = [{"prompt": " ".join(words[: 1 + k % 5]) + f" {k}"} for k in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def options(start: Path, output: Path, asked: Path, **more: Any) -> PpoOptions:
    chosen: dict[str, Any] = {
        "base": str(start),
        "output": str(output),
        "prompts": [str(asked)],
        "reward": {"function": f"{__name__}:letters"},
        "tuning": "top_layers",
        "top_layers": 1,
        "value_width": 16,
        "iterations": 3,
        "global_batch_size": 8,
        "ppo_epochs": 2,
        "max_new_tokens": 8,
        "missing_end": "none",
        "learning_rate": 3e-3,
        "value_learning_rate": 1e-2,
        "device": "cpu",
        "mixed_precision": "no",
        "seed": 3,
    }
    return PpoOptions.model_validate({**chosen, **more})


def parts(base: Path, output: Path, **more: Any) -> PpoParts:
    """Models and learner without a run. New weights are the same each time."""
    torch.manual_seed(0)
    return build_parts(Accelerator(cpu=True), options(base, output, output / "none.jsonl", **more))
