"""Scoring by an encoder: `LocalScorer` beside CrossEncoder.predict of sentence-transformers, same model, same texts.

Callers come at once, each with some completions of mixed length. A service around CrossEncoder scores request after
request, since its model takes one list at a time; given all requests in one list, which nobody has, it could sort them
by length. CPU time on one thread, each library in a process of its own, by turns.

The model is all-MiniLM-L6-v2 with a head for one label.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import bars, peers
from benchmarks.tables import Table
from reward.bases import quiet_loading
from reward.local import LocalScorer

CALLERS, COMPLETIONS, ROUNDS = 16, 4, 3
WORDS = (16, 300)
"""Shortest and longest completion."""
_SCRIPT = Path(__file__).with_name("cross_encoder_script.py")
_TEXT = (
    "people learn a language by reading it aloud with a friend who speaks it well and has time while others write a "
    "few lines a day and let somebody correct them until grammar explains itself"
)

Pairs = list[tuple[str, str]]
"""Of one caller: the prompt, and one of its completions."""


def run(callers: int = CALLERS, completions: int = COMPLETIONS, rounds: int = ROUNDS) -> list[Table]:
    """Half a minute of CPU, after the installation."""
    import torch

    base = peers.minilm()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            peers.library(peers.SENTENCE_TRANSFORMERS, _SCRIPT) as cross_encoder,
            tempfile.TemporaryDirectory() as scratch,
        ):
            if base is None or cross_encoder is None:
                return []
            return asyncio.run(
                _compare(_model_folder(base, Path(scratch)), cross_encoder, callers, completions, rounds)
            )
    finally:
        torch.set_num_threads(threads)


def requests(callers: int, completions: int, seed: int) -> list[Pairs]:
    """One a caller. A prompt with its completion stays under 512 tokens: each library cuts in its own way."""
    choice = random.Random(seed)

    def text(shortest: int, longest: int) -> str:
        return " ".join(choice.choices(_TEXT.split(), k=choice.randint(shortest, longest)))

    prompts = [text(8, 60) for _ in range(callers)]
    return [[(prompt, text(*WORDS)) for _ in range(completions)] for prompt in prompts]


async def _compare(
    source: str, cross_encoder: peers.Library, callers: int, completions: int, rounds: int
) -> list[Table]:
    seconds: dict[str, list[float]] = {"ours": [], "theirs": [], "joined": []}
    difference = 0.0
    scorer = LocalScorer(source, device="cpu")
    await scorer.start()
    cross_encoder.ask(source=source)
    try:
        for seed in range(-1, rounds):
            asked = requests(callers, completions, seed)
            rewards, ours = await _ours(scorer, asked)
            apart = cross_encoder.ask(requests=asked, joined=False)
            joined = cross_encoder.ask(requests=asked, joined=True)
            spread = statistics.stdev(rewards)
            difference = max(difference, *(abs(a - b) / spread for a, b in zip(rewards, apart["rewards"], strict=True)))
            if seed >= 0:  # the round before that warms caches
                for name, cpu_s in (("ours", ours), ("theirs", apart["cpu_s"]), ("joined", joined["cpu_s"])):
                    seconds[name].append(cpu_s)
    finally:
        await scorer.aclose()
    count = callers * completions
    rows = [
        _row(f"{cross_encoder.name}, request after request", "theirs", seconds, count),
        _row(f"{cross_encoder.name}, all requests in one list", "joined", seconds, count),
        [*_row("LocalScorer, callers at once", "ours", seconds, count)[:-1], f"{difference:.0e}"],
    ]
    title = f"Scoring by an encoder, {callers} callers with {completions} completions each, by the CPU second"
    columns = ["way", "completions", "÷ CrossEncoder", "rewards apart, in deviations"]
    bar = bars.Bar(
        "encoder: speed ÷ CrossEncoder.predict, callers at once", 1.3, _ratio(seconds, "theirs", "ours"), at_least=True
    )
    return [Table(title, columns, rows), bars.table([bar])]


def _row(name: str, way: str, seconds: dict[str, list[float]], count: int) -> list[str | float | None]:
    return [name, count / statistics.median(seconds[way]), _ratio(seconds, "theirs", way), None]


def _ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


async def _ours(scorer: LocalScorer, asked: Sequence[Pairs]) -> tuple[list[float], float]:
    """Rewards in order, and CPU seconds."""
    started = time.process_time()
    scores = await asyncio.gather(
        *(
            scorer.score(
                [{"role": "user", "content": pairs[0][0]}],
                [[{"role": "assistant", "content": text}] for _, text in pairs],
            )
            for pairs in asked
        )
    )
    return [one.raw_reward for own in scores for one in own], time.process_time() - started


def _model_folder(base: Path, folder: Path) -> str:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with quiet_loading(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        tokenizer = AutoTokenizer.from_pretrained(base)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)
