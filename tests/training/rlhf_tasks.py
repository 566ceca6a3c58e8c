"""A whole loop that a tiny model goes through in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.training import ppo_tasks, tasks
from training.rlhf_options import RlhfOptions


def options(home: Path, base: Path, output: Path, **more: Any) -> RlhfOptions:
    """Settings for it; its data is written to `home`."""
    asked = ppo_tasks.write_prompts(home / "prompts.jsonl", 12)
    held_out = ppo_tasks.write_prompts(home / "held-out.jsonl", 8)
    demonstrations = tasks.write_lines(
        home / "demonstrations.jsonl", [{"prompt": f"say {n}", "completion": "one two three"} for n in range(8)]
    )
    comparisons = tasks.write_preferences(home / "preferences.jsonl", 12, seed=1)
    validation = tasks.write_preferences(home / "preferences.validation.jsonl", 8, seed=2)
    chosen: dict[str, Any] = {
        "output": str(output),
        "rounds": 2,
        "base": str(base),
        "sft": {
            "train": [str(demonstrations)],
            "validation": [str(demonstrations)],
            "epochs": 2,
            "global_batch_size": 4,
            "learning_rate": 3e-3,
            "eval_every": 2,
            "num_samples": 0,
            "mixed_precision": "no",
        },
        "sample": {"prompts": [str(asked)], "prompts_per_round": 6, "count": 3, "max_tokens": 8},
        "rank": {"gold": {"function": "tests.training.ppo_tasks:letters"}},
        "reward": {
            "base": str(base),
            "train": [str(comparisons)],
            "validation": [str(validation)],
            "max_length": 96,
            "mixed_precision": "no",
            "head_fit": {"l2": [1e-2], "folds": 2},
        },
        "ppo": {
            "tuning": "top_layers",
            "top_layers": 1,
            "value_width": 16,
            "iterations": 2,
            "global_batch_size": 8,
            "ppo_epochs": 2,
            "max_new_tokens": 8,
            "missing_end": "none",
            "learning_rate": 3e-3,
            "value_learning_rate": 1e-2,
            "eval_every": 1,
            "mixed_precision": "no",
        },
        "ppo_seeds": [0, 1],
        "evaluate": {"prompts": [str(held_out)], "num_prompts": 7},
        "seed": 3,
        "device": "cpu",
    }
    return RlhfOptions.model_validate({**chosen, **more})
