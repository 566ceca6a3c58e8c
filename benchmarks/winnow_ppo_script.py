"""Winnow's side of `ppo.py` and `ppo_frontier.py`, in a process of its own as TRL's is: questions and answers are
those of `trl_ppo_script.py`, with the memory mode as `tuning` and, for a whole value model, `value_base`.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from feedback.jsonl import write_records
from training import ppo
from training.policies import save_policy
from training.ppo import train_ppo
from training.ppo_options import PpoOptions
from training.ppo_state import load_progress

_answers, sys.stdout = sys.stdout, sys.stderr
torch.set_num_threads(1)


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(_trained(json.loads(line))), file=_answers, flush=True)


def _trained(question: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        write_records(home / "prompts.jsonl", [{"prompt": text} for text in question["prompts"]])
        if "keep_every" in question:
            return {"kept": _kept(question, home)}
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
    options = _options(question, home, name, iterations)
    started = time.process_time()
    train_ppo(options)
    cpu_s = time.process_time() - started
    lines = (home / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return cpu_s, [json.loads(line) for line in lines]


def _options(question: dict[str, Any], home: Path, name: str, iterations: int) -> PpoOptions:
    rule = question.get("rule")
    return PpoOptions.model_validate(
        {
            "base": question["model"],
            "reward": {"function": rule} if rule else {"model": question["reward_model"]},
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
            **question.get("more", {}),
        }
    )


def _kept(question: dict[str, Any], home: Path) -> list[dict[str, Any]]:
    """One run that leaves its policy where it would leave checkpoints; loading and saving are not in the time."""
    kept: list[dict[str, Any]] = []
    started = 0.0

    def begin(*arguments: Any) -> None:
        nonlocal started
        load_progress(*arguments)
        started = time.process_time()

    def keep(accelerator: Any, parts: Any, progress: Any, run: Path) -> None:
        nonlocal started
        now = time.process_time()
        target = Path(question["keep_in"]) / str(progress.iteration)
        save_policy(parts.actors.policy, target, merge=True)
        kept.append({"iterations": progress.iteration, "cpu_s": now - started, "policy": str(target)})
        started += time.process_time() - now

    options = _options(question, home, "kept", question["iterations"])
    with mock.patch.object(ppo, "load_progress", begin), mock.patch.object(ppo, "save_progress", keep):
        train_ppo(options.model_copy(update={"save_every": question["keep_every"]}))
    return kept


main()
