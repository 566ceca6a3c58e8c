"""Runs in the environment of TRL: SFTTrainer and DPOTrainer, for comparison.

A question is a line of JSON: `{"method", "model", "records", "batch_size", "max_length", "learning_rate", "beta"}`, the
records in TRL's conversational format. One pass over them is taken, in an order of TRL's own. The answer has the CPU
seconds of the training alone (reading and tokenising come before), the loss of each step and the peak of memory.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

_answers, sys.stdout = sys.stdout, sys.stderr
torch.set_num_threads(1)


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(_trained(json.loads(line))), file=_answers, flush=True)


def _trained(question: dict[str, Any]) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(question["model"])
    model = AutoModelForCausalLM.from_pretrained(question["model"], dtype=torch.float32)
    with tempfile.TemporaryDirectory() as output:
        settings: dict[str, Any] = {
            "output_dir": output,
            "num_train_epochs": 1,
            "per_device_train_batch_size": question["batch_size"],
            "max_length": question["max_length"],
            "learning_rate": question["learning_rate"],
            "lr_scheduler_type": "cosine",
            "max_grad_norm": 1.0,
            # What it does by default suits GPUs: here it would cost half as much again, and bf16 more.
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            # Ours writes one at the end, too.
            "save_strategy": "epoch",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 0,
        }
        data = Dataset.from_list(question["records"])
        if question["method"] == "sft":
            config = SFTConfig(completion_only_loss=True, **settings)
            trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
        else:
            config = DPOConfig(beta=question["beta"], **settings)
            trainer = DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
        started = time.process_time()
        trainer.train()
        cpu_s = time.process_time() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"cpu_s": cpu_s, "losses": losses, "steps": trainer.state.global_step, "peak_kib": peak}


main()
