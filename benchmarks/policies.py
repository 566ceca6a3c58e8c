"""`winnow train sft` and `dpo` beside TRL's SFTTrainer and DPOTrainer: same model, records and batches of a step.

CPU time of the training alone on one thread, each side in a process of its own, by turns; what is read and tokenised
before is left out, the checkpoint at the end is counted, on both sides. Full tuning in fp32. The model is a
Llama with random weights and SmolLM2's tokenizer, or, with `--full`, SmolLM2-135M itself.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from benchmarks import bars, peers
from benchmarks.processes import clean_environment
from benchmarks.tables import Table
from reward.bases import DEFAULT_BASE, quiet_loading, resolve_base

Method = Literal["sft", "dpo"]
BATCH_SIZE, MAX_LENGTH, BETA = 8, 512, 0.1
ROUNDS = 3
WORDS = "the a of and to in is it you that he was for on are with as his they at be this from have or by one had not"
_HERE = Path(__file__).parent
_TRL, _OURS = _HERE / "trl_policies_script.py", _HERE / "winnow_policies_script.py"


def run(rounds: int = ROUNDS, batches: int = 4) -> list[Table]:
    """Some five minutes of CPU with the small model."""
    with tempfile.TemporaryDirectory() as scratch:
        return _compared("a Llama of 17 million weights", small_model(Path(scratch)), rounds, batches)


def run_full() -> list[Table]:
    """With SmolLM2-135M: some ten minutes of CPU."""
    with tempfile.TemporaryDirectory() as scratch:
        small = _compared("a Llama of 17 million weights", small_model(Path(scratch)), ROUNDS, 4)
    return [*small, *_compared("SmolLM2-135M", resolve_base(DEFAULT_BASE), 1, 2)]


def records(method: Method, count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of 16 to 160 words, answers of 8 to 160; lengths as mixed as people's are."""
    choice = random.Random(seed)
    words = WORDS.split()

    def text(low: int, high: int) -> str:
        return " ".join(choice.choices(words, k=round(low * (high / low) ** choice.random())))

    made = []
    for _ in range(count):
        prompt = [{"role": "user", "content": text(16, 160)}]
        answers = [[{"role": "assistant", "content": text(8, 160)}] for _ in range(2)]
        if method == "sft":
            made.append({"prompt": prompt, "completion": answers[0]})
        else:
            made.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    return made


def _compared(title: str, model: str, rounds: int, batches: int, batch_size: int = BATCH_SIZE) -> list[Table]:
    rows: list[list[str | float | None]] = []
    wanted: list[bars.Bar] = []
    with peers.library(peers.TRL, _TRL) as trl, winnow_side(_OURS) as winnow:
        if trl is None:
            return []
        for method, unit in (("sft", "tokens"), ("dpo", "pairs")):
            found: dict[str, list[dict[str, Any]]] = {winnow.name: [], trl.name: []}
            for number in range(rounds):
                question = {
                    "method": method,
                    "model": model,
                    "records": records(method, batches * batch_size, seed=number),  # type: ignore[arg-type]
                    "batch_size": batch_size,
                    "max_length": MAX_LENGTH,
                    "learning_rate": 1e-6,
                    "beta": BETA,
                }
                for side in (winnow, trl):
                    found[side.name].append(side.ask(**question))
            ratios = [
                theirs["cpu_s"] / ours["cpu_s"]
                for ours, theirs in zip(found[winnow.name], found[trl.name], strict=True)
            ]
            for side in (winnow, trl):
                runs = found[side.name]
                done = [one["tokens"] if method == "sft" else batches * batch_size for one in found[winnow.name]]
                speed = statistics.median(n / one["cpu_s"] for n, one in zip(done, runs, strict=True))
                loss = statistics.fmean(loss for one in runs for loss in one["losses"])
                ratio = statistics.median(ratios) if side is winnow else None
                steps = runs[0]["steps"]
                rows.append([f"{method}, {side.name}", speed, unit, ratio, loss, steps, runs[-1]["peak_kib"] / 2**20])
            wanted.append(bars.Bar(f"{method}: {unit} a second ÷ TRL", 1.0, statistics.median(ratios), "", True))
    columns = ["trainer", "a CPU second", "of", "÷ TRL", "mean loss", "steps", "peak GiB"]
    return [Table(f"Training {title}: batches of {batch_size}, median of {rounds}", columns, rows), bars.table(wanted)]


@contextlib.contextmanager
def winnow_side(script: Path) -> Iterator[peers.Library]:
    """A script of ours that answers as a peer's does, in a process of its own."""
    environment = clean_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_HERE.parent)}
    command = [sys.executable, "-P", str(script)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield peers.Library("winnow", process)
    finally:
        process.kill()
        process.communicate()


def small_model(folder: Path) -> str:
    """A Llama of 17 million random weights with SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(resolve_base(DEFAULT_BASE))
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with quiet_loading():
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)
