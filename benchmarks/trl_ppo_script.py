"""Runs in the environment of TRL 1.12, the last that had a PPO: its experimental PPOTrainer, for comparison.

A question is a line of JSON: `{"model", "reward_model", "prompts", "batch_size", "iterations", "epochs", "new_tokens",
"learning_rate"}`, the prompts as texts. The answer has the CPU seconds of the training alone, the peak of memory, and
score and KL of each iteration. More may be asked for: `rule`, a function (`module:name`) that scores instead of the
reward model, which the value model starts as all the same; `more`, settings; `keep_every` so many iterations the policy
in a folder of `keep_in`, told with the CPU seconds until then.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
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
    if "rule" in question:
        reward = _Rule(question["rule"], tokenizer, question["new_tokens"])
    data = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in question["prompts"]])
    with tempfile.TemporaryDirectory() as output:
        settings = {
            "output_dir": output,
            "total_episodes": question["iterations"] * question["batch_size"],
            "per_device_train_batch_size": question["batch_size"],
            "local_rollout_forward_batch_size": question["batch_size"],
            "gradient_accumulation_steps": 1,
            "num_mini_batches": 1,
            "num_ppo_epochs": question["epochs"],
            "response_length": question["new_tokens"],
            "temperature": 1.0,
            "kl_coef": 0.05,
            "learning_rate": question["learning_rate"],
            "num_sample_generations": 0,
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 0,
        }
        trainer = PPOTrainer(
            args=PPOConfig(**{**settings, **question.get("more", {})}),
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=data,
            eval_dataset=data.select(range(1)),
        )
        keeper = _Keeper(policy, question.get("keep_every"), question.get("keep_in", ""))
        trainer.add_callback(keeper)
        started = keeper.started = time.process_time()
        trainer.train()
        cpu_s = time.process_time() - started
    lines = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    return {
        "cpu_s": cpu_s,
        "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "scores": [line["objective/scores"] for line in lines],
        "kls": [line["objective/kl"] for line in lines],
        "kept": keeper.kept,
    }


class _Rule(torch.nn.Module):
    """A rule where TRL wants a reward model: backbone and head, the score of a completion at its last token."""

    base_model_prefix = "backbone"

    def __init__(self, rule: str, tokenizer: Any, new_tokens: int) -> None:
        super().__init__()
        self.backbone, self.score = _RuleBackbone(rule, tokenizer, new_tokens), torch.nn.Identity()


class _RuleBackbone(torch.nn.Module):
    """For completions that are all of one length: nothing else says where they begin."""

    def __init__(self, rule: str, tokenizer: Any, new_tokens: int) -> None:
        super().__init__()
        sys.path.append(str(Path(__file__).parent.parent))  # Last: TRL's environment goes first.
        module, _, name = rule.partition(":")
        self._rule = getattr(importlib.import_module(module), name)
        self._tokenizer, self._new_tokens = tokenizer, new_tokens

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        texts = self._tokenizer.batch_decode(input_ids[:, -self._new_tokens :], skip_special_tokens=True)
        scores = torch.tensor(self._rule([], texts))
        return SimpleNamespace(hidden_states=[scores[:, None, None].expand(*input_ids.shape, 1)])


class _Keeper(TrainerCallback):
    """Saves the policy every so many iterations; the time that takes is not the trainer's."""

    def __init__(self, policy: Any, every: int | None, folder: str) -> None:
        self._policy, self._every, self._folder = policy, every, Path(folder)
        self.kept: list[dict[str, Any]] = []
        self.started = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._every is None or state.global_step % self._every:
            return
        now = time.process_time()
        target = str(self._folder / str(state.global_step))
        self._policy.save_pretrained(target)
        self.kept.append({"iterations": state.global_step, "cpu_s": now - self.started, "policy": target})
        self.started += time.process_time() - now


main()
