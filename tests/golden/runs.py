"""Golden runs: what the first steps of a training gave when they were last looked at.

`python -m tests.golden.runs [NAME …]` writes them anew; a change to one is explained where it is made.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from feedback.jsonl import Skipped, write_records
from tests.fakes.models import build_tiny_causal_lm
from training.comparisons import read_comparisons
from training.dpo import DpoOptions, train_dpo
from training.options import RewardOptions
from training.ppo import train_ppo
from training.ppo_options import PpoOptions
from training.reward_model import train_reward_model
from training.sft import SftOptions, train_sft

HERE = Path(__file__).parent
DATA = HERE.parent / "data"
STEPS = 10
TRAIN = ["oasst_rankings.train", "oasst_preferences.train", "gsm8k_rankings.train"]

REWARD: dict[str, dict[str, Any]] = {
    "reward_lora": {"tuning": "lora", "learning_rate": 5e-3, "lora": {"rank": 4, "dropout": 0.0}},
    "reward_lora_pooled": {
        "tuning": "lora",
        "learning_rate": 5e-3,
        "pooling": ["last", "mean"],
        "lora": {"rank": 4, "dropout": 0.0},
    },
    "reward_full": {"tuning": "full", "learning_rate": 1e-3, "weight_decay": 0.01, "centering": 0.01},
}
"""Settings of each golden run of the reward trainer, on the sample of real data."""


def reward_steps(name: str, home: Path) -> list[dict[str, float]]:
    """Loss and gradient norm (before clipping) of the first steps."""
    torch.set_num_threads(1)
    base = build_tiny_causal_lm(home / "base")
    options = RewardOptions.model_validate(
        {
            "base": str(base),
            "output": str(home / name),
            "train": [str(DATA / f"{file}.jsonl.gz") for file in TRAIN],
            "device": "cpu",
            "max_length": 256,
            "global_batch_size": 8,
            "micro_batch_tokens": 4096,
            "epochs": STEPS / 14,
            "seed": 11,
            **REWARD[name],
        }
    )
    train_reward_model(options)
    lines = (home / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: json.loads(line)[key] for key in ("step", "loss", "grad_norm")} for line in lines]


POLICIES: dict[str, dict[str, Any]] = {
    "sft_full": {"learning_rate": 1e-3, "weight_decay": 0.01},
    "sft_lora": {"learning_rate": 5e-3, "tuning": "lora", "lora": {"rank": 4, "dropout": 0.0}},
    "dpo_full": {"learning_rate": 1e-3, "label_smoothing": 0.1, "max_length": 128},
    "dpo_lora": {
        "learning_rate": 5e-3,
        "tuning": "lora",
        "lora": {"rank": 4, "dropout": 0.0},
        "reference": "adapter_off",
        "max_length": 128,
    },
}
"""Settings of each golden run of the trainers of policies; the better completions serve as demonstrations."""


def policy_steps(name: str, home: Path) -> list[dict[str, float]]:
    """Loss and gradient norm (before clipping) of the first steps."""
    torch.set_num_threads(1)
    settings = {
        "base": str(build_tiny_causal_lm(home / "base")),
        "output": str(home / name),
        "device": "cpu",
        "max_length": 256,
        "global_batch_size": 8,
        "micro_batch_tokens": 2048,
        "warmup_share": 0.1,
        "seed": 11,
        **POLICIES[name],
    }
    comparisons = [str(DATA / f"{file}.jsonl.gz") for file in TRAIN]
    if name.startswith("sft"):
        groups = read_comparisons(comparisons, False, Skipped())
        records = [{"prompt": g.prompt, "completion": g.completions[g.pairs[0].better]} for g in groups]
        write_records(home / "demonstrations.jsonl", records)
        settings |= {"train": [str(home / "demonstrations.jsonl")], "epochs": 8 * STEPS / len(records)}
        train_sft(SftOptions.model_validate(settings))
    else:
        settings |= {"train": comparisons, "epochs": STEPS / 14}
        train_dpo(DpoOptions.model_validate(settings))
    lines = (home / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: json.loads(line)[key] for key in ("step", "loss", "grad_norm")} for line in lines]


PPO: dict[str, dict[str, Any]] = {
    "ppo_full": {"tuning": "full", "learning_rate": 1e-4, "kl_target": 2.0, "kl_horizon": 100.0},
    "ppo_lora": {"tuning": "lora", "learning_rate": 5e-4, "lora": {"rank": 4}, "num_minibatches": 2},
    "ppo_top_layers": {"tuning": "top_layers", "top_layers": 1, "learning_rate": 1e-3},
}
"""Settings of each golden run of PPO: the prompts are the sample's, the reward a rule.

With ten times these rates what two CPUs round differently grows until they sample other tokens; as they are, figures
agree to a few in ten thousand between a CPU's vector units and none (`ATEN_CPU_CAPABILITY=default`).
"""


def ppo_steps(name: str, home: Path) -> list[dict[str, float]]:
    """Losses, gradient norms (before clipping), score and KL of the first iterations."""
    torch.set_num_threads(1)
    settings = {
        "base": str(build_tiny_causal_lm(home / "base", spread=1.0)),
        "output": str(home / name),
        "prompts": [str(DATA / f"{file}.jsonl.gz") for file in TRAIN],
        "max_prompt_tokens": 128,
        "max_new_tokens": 8,
        "reward": {"function": "tests.training.ppo_tasks:letters"},
        "device": "cpu",
        "mixed_precision": "no",
        "iterations": STEPS,
        "global_batch_size": 8,
        "ppo_epochs": 2,
        "value_learning_rate": 1e-2,
        "value_width": 16,
        "seed": 11,
        **PPO[name],
    }
    train_ppo(PpoOptions.model_validate(settings))
    lines = (home / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
    kept = ("step", "score", "kl", "policy_loss", "value_loss", "policy_grad_norm", "value_grad_norm")
    return [{key: json.loads(line)[key] for key in kept} for line in lines]


Steps = Callable[[str, Path], list[dict[str, float]]]
RUNS: dict[str, Steps] = {
    **dict.fromkeys(REWARD, reward_steps),
    **dict.fromkeys(POLICIES, policy_steps),
    **dict.fromkeys(PPO, ppo_steps),
}
"""How each golden run is made."""


def golden(name: str) -> list[dict[str, float]]:
    """What is on record."""
    record: list[dict[str, float]] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    return record


def main() -> None:
    for name in sys.argv[1:] or RUNS:
        with tempfile.TemporaryDirectory() as home:
            lines = [json.dumps(step) for step in RUNS[name](name, Path(home))]
        (HERE / f"{name}.json").write_text("[\n " + ",\n ".join(lines) + "\n]\n", encoding="utf-8")
        print(f"{name}: {len(lines)} steps", file=sys.stderr)


if __name__ == "__main__":
    main()
