"""Runs in the environment of TRL: RewardTrainer on pairs of chosen and rejected.

A question is a line of JSON: `{"model", "pairs": [{"chosen", "rejected"}], "output", "steps", "learning_rate",
"warmup_steps"}`, the pairs as whole conversations. One pass over them is taken in so many steps. The answer has the
CPU seconds of the training alone: reading and tokenising come before. The model is then in `output`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import RewardConfig, RewardTrainer

BATCH_SIZE = 8
"""Pairs in a forward pass, as transformers' trainers have by default."""

_answers, sys.stdout = sys.stdout, sys.stderr
torch.set_num_threads(1)


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(_trained(json.loads(line))), file=_answers, flush=True)


def _trained(question: dict[str, Any]) -> dict[str, Any]:
    pairs = question["pairs"]
    config = RewardConfig(
        output_dir=question["output"],
        num_train_epochs=1,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=max(1, math.ceil(len(pairs) / question["steps"] / BATCH_SIZE)),
        learning_rate=question["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=question["warmup_steps"],
        # What it does by default suits GPUs: here it would cost half as much again, and bf16 more.
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    tokenizer = AutoTokenizer.from_pretrained(question["model"])
    trainer = RewardTrainer(
        question["model"], args=config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
    )
    started = time.process_time()
    trainer.train()
    cpu_s = time.process_time() - started
    trainer.save_model(question["output"])
    return {"cpu_s": cpu_s, "steps": trainer.state.global_step, "pairs": len(trainer.train_dataset)}


main()
