"""Winnow's side of `policies.py`, in a process of its own as TRL's is: questions and answers are those of
`trl_policies_script.py`.
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

from feedback.jsonl import Skipped
from feedback.rankings import group_comparisons
from feedback.records import parse_demonstration, parse_preference
from training.dpo import REFERENCE_NAME, DpoOptions, dpo_objective, encode_comparisons
from training.fitting import fit
from training.loop import start_accelerator
from training.policies import load_policy_for
from training.sft import SftOptions, encode_demonstrations, sft_objective

_answers, sys.stdout = sys.stdout, sys.stderr
torch.set_num_threads(1)


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(_trained(json.loads(line))), file=_answers, flush=True)


def _trained(question: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as output:
        settings: dict[str, Any] = {
            "base": question["model"],
            "output": output,
            "train": [],
            "device": "cpu",
            "mixed_precision": "no",
            "epochs": 1,
            "global_batch_size": question["batch_size"],
            "max_length": question["max_length"],
            "micro_batch_tokens": 2 * question["batch_size"] * question["max_length"],
            "learning_rate": question["learning_rate"],
            "warmup_share": 0.0,
            "save_every": 10**6,
        }
        run = Path(output)
        if question["method"] == "sft":
            sft = SftOptions.model_validate(settings)
            policy = load_policy_for(sft)
            demonstrations = [parse_demonstration(record) for record in question["records"]]
            data = [item for _, item in encode_demonstrations(policy, demonstrations, sft, Skipped())]
            tokens = sum(map(len, data))
            started = time.process_time()
            fit(start_accelerator(sft), policy, sft_objective(policy, data, [], sft), sft, run)
        else:
            dpo = DpoOptions.model_validate({**settings, "beta": question["beta"]})
            policy = load_policy_for(dpo)
            groups = group_comparisons([parse_preference(record) for record in question["records"]])
            compared = encode_comparisons(policy, groups, dpo, Skipped())
            tokens = sum(group.num_tokens for group in compared)
            started = time.process_time()
            fit(
                start_accelerator(dpo), policy, dpo_objective(policy, compared, [], dpo, run / REFERENCE_NAME), dpo, run
            )
        cpu_s = time.process_time() - started
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    losses = [line["loss"] for line in lines]
    return {"cpu_s": cpu_s, "losses": losses, "steps": len(lines), "peak_kib": peak, "tokens": tokens}


main()
