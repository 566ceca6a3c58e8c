"""`winnow train ppo` beside the last PPOTrainer that TRL had (1.12, experimental): same model, reward model, batches.

CPU time of the iterations alone on one thread, each side in a process of its own. TRL trains all weights of a policy
and of a whole value model, beside a reference and a reward model. Winnow does the same (`full`), and what it offers
instead: adapters on one copy of the weights that serves policy and reference, with a small value model on the
reference's hidden states (`lora`). The bars are the latter's. Whether PPO learns is `ppo_learns.py`'s question.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import bars, peers
from benchmarks.policies import WORDS, small_model, winnow_side
from benchmarks.tables import Table
from reward.bases import DEFAULT_BASE, quiet_loading, resolve_base

BATCH_SIZE, NEW_TOKENS, EPOCHS, PROMPT_WORDS = 16, 24, 4, 15
SPEED_BAR, MEMORY_BAR = 1.5, 0.7
_HERE = Path(__file__).parent
_TRL, _OURS = _HERE / "trl_ppo_script.py", _HERE / "winnow_ppo_script.py"


def run(iterations: int = 3) -> list[Table]:
    """Some two minutes of CPU."""
    with tempfile.TemporaryDirectory() as scratch:
        return _compared("a Llama of 17 million weights", small_model(Path(scratch) / "model"), iterations)


def run_full() -> list[Table]:
    """With SmolLM2-135M: some ten minutes of CPU."""
    return _compared("SmolLM2-135M", resolve_base(DEFAULT_BASE), 2)


def _compared(title: str, model: str, iterations: int) -> list[Table]:
    choice = random.Random(0)
    prompts = [" ".join(choice.choices(WORDS.split(), k=PROMPT_WORDS)) for _ in range(iterations * BATCH_SIZE)]
    with tempfile.TemporaryDirectory() as scratch, peers.library(peers.TRL_WITH_PPO, _TRL) as trl:
        if trl is None:
            return []
        reward_model = _reward_model(model, Path(scratch))
        question: dict[str, Any] = {
            "model": model,
            "reward_model": reward_model,
            "prompts": prompts,
            "batch_size": BATCH_SIZE,
            "iterations": iterations,
            "epochs": EPOCHS,
            "new_tokens": NEW_TOKENS,
            "learning_rate": 1e-5,
        }
        found = {trl.name: trl.ask(**question)}
        for name, more in (
            ("winnow, full", {"tuning": "full", "value_base": reward_model}),
            ("winnow, lora", {"tuning": "lora", "value_base": None}),
        ):
            # Each in a process of its own, so that the peak of memory is its own, too.
            with winnow_side(_OURS) as winnow:
                found[name] = winnow.ask(**question, **more)
    theirs = found[trl.name]
    rows: list[list[str | float | None]] = [
        [
            name,
            iterations * BATCH_SIZE / one["cpu_s"],
            theirs["cpu_s"] / one["cpu_s"],
            one["peak_kib"] / 2**20,
            one["peak_kib"] / theirs["peak_kib"],
        ]
        for name, one in found.items()
    ]
    ours = found["winnow, lora"]
    held = [
        bars.Bar("PPO samples a second ÷ TRL", SPEED_BAR, theirs["cpu_s"] / ours["cpu_s"], "", True),
        bars.Bar("PPO peak memory ÷ TRL", MEMORY_BAR, ours["peak_kib"] / theirs["peak_kib"], "", False),
    ]
    columns = ["trainer", "samples a CPU second", "÷ TRL", "peak GiB", "÷ TRL "]
    told = f"PPO on {title}: {BATCH_SIZE} completions of {NEW_TOKENS} tokens, {EPOCHS} epochs"
    return [Table(told, columns, rows), bars.table(held)]


def _reward_model(model: str, folder: Path) -> str:
    """The same model with one label and a random head."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    with quiet_loading():
        classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
        classifier.config.pad_token_id = tokenizer.pad_token_id
        classifier.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)
