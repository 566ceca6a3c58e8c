"""Runs in the environment of TRL 1.12, the last that had a PPO: its experimental PPOTrainer, for comparison.

A question is a line of JSON: `{"model", "reward_model", "prompts", "batch_size", "iterations", "epochs", "new_tokens",
"learning_rate"}`, the prompts as texts. The answer has the CPU seconds of the training alone, the peak of memory, and
score and KL of each iteration.
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
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

_answers, sys.stdout = sys.stdout, sys.stderr
torch.set_num_threads(1)


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(_trained(json.loads(line))), file=_answers, flush=True)


def _trained(question: dict[str, Any]) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(question["model"], padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(question["model"], dtype=torch.float32) for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(question["reward_model"], num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    data = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in question["prompts"]])
    with tempfile.TemporaryDirectory() as output:
        config = PPOConfig(
            output_dir=output,
            total_episodes=question["iterations"] * question["batch_size"],
            per_device_train_batch_size=question["batch_size"],
            local_rollout_forward_batch_size=question["batch_size"],
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=question["epochs"],
            response_length=question["new_tokens"],
            temperature=1.0,
            kl_coef=0.05,
            learning_rate=question["learning_rate"],
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=data,
            eval_dataset=data.select(range(1)),
        )
        started = time.process_time()
        trainer.train()
        cpu_s = time.process_time() - started
    lines = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    return {
        "cpu_s": cpu_s,
        "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "scores": [line["objective/scores"] for line in lines],
        "kls": [line["objective/kl"] for line in lines],
    }


main()
