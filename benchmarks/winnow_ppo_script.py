"""Winnow's side of `ppo.py`, in a process of its own as TRL's is: questions and answers are those of
`trl_ppo_script.py`, with the memory mode as `tuning` and, for a whole value model, `value_base`.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from feedback.jsonl import write_records
from training.ppo import train_ppo
from training.ppo_options import PpoOptions

_answers, sys.stdout = sys.stdout, sys.stderr
torch.set_num_threads(1)


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(_trained(json.loads(line))), file=_answers, flush=True)


def _trained(question: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        write_records(home / "prompts.jsonl", [{"prompt": text} for text in question["prompts"]])
        # Of a run of one iteration all is taken off but iterations: reading, loading, writing.
        single, _ = _run(question, home, "single", 1)
        whole, lines = _run(question, home, "whole", question["iterations"])
    count = question["iterations"]
    return {
        "cpu_s": (whole - single) * count / (count - 1),
        "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "scores": [line["score"] for line in lines],
        "kls": [line["kl"] for line in lines],
    }


def _run(question: dict[str, Any], home: Path, name: str, iterations: int) -> tuple[float, list[dict[str, float]]]:
    options = PpoOptions.model_validate(
        {
            "base": question["model"],
            "reward": {"model": question["reward_model"]},
            "value_base": question["value_base"],
            "tuning": question["tuning"],
            "prompts": [str(home / "prompts.jsonl")],
            "prompt_format": "text",
            "output": str(home / name),
            "iterations": iterations,
            "global_batch_size": question["batch_size"],
            "ppo_epochs": question["epochs"],
            "max_new_tokens": question["new_tokens"],
            "missing_end": "none",
            "kl_coef": 0.05,
            "learning_rate": question["learning_rate"],
            "value_learning_rate": question["learning_rate"],
            "micro_batch_tokens": 10**6,  # one micro-batch, as TRL's
            "save_every": 10**6,
            "device": "cpu",
            "mixed_precision": "no",
        }
    )
    started = time.process_time()
    train_ppo(options)
    cpu_s = time.process_time() - started
    lines = (home / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return cpu_s, [json.loads(line) for line in lines]


main()
