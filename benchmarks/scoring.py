"""Scoring N completions of a prompt: `LocalScorer` beside what one writes with transformers, same model, same texts.

* pipeline: transformers' text-classification pipeline as it runs by default, one text after the other;
* by hand: template, tokenise, pad, forward, in batches of `_BY_HAND`.

All from messages to numbers, in CPU time on one thread: threads that wait for each other count as busy. The model is
the embedded base cut to its first layers, which cost alike, with a head for one label; its padding is not its end of
turn, so that transformers' own heads read the token they should. Every round has texts of its own, so nothing is
remembered, and the ways take turns.

The prompt encoded once, N completions cost at best N(P + R) / (P + N R) less, for P and R tokens: the ideal ratio.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import bars
from benchmarks.tables import Table
from feedback.records import Message, Messages
from reward.bases import DEFAULT_BASE, quiet_loading, resolve_base
from reward.local import LocalScorer

LAYERS = 2
ROUNDS = 2
COMPLETION = (64, 256)
"""Shortest and longest completion, in tokens."""
_BY_HAND = 8
_FROM_PROMPT = 256
"""From here on a shared prompt has to pay."""
_TEXT = (
    "Start with the words that people use every day, and say them aloud. You will forget most of them, which is no "
    "reason to stop. A teacher helps, but a friend who speaks the language helps more, since a friend has time. Read "
    "what you would read anyway: recipes, news, the rules of a game. Write a few lines a day and let somebody correct "
    "them. Grammar explains itself later, once there are sentences in your head for it to explain."
)


@dataclass(frozen=True, slots=True)
class Grid:
    """Tokens of the prompt, and numbers of completions."""

    prompts: Sequence[int]
    counts: Sequence[int]


QUICK = Grid((64, 256, 1024), (4, 16))
FULL = Grid((64, 256, 1024, 2048), (4, 8, 16, 32))


def run(
    grid: Grid = QUICK, completion: tuple[int, int] = COMPLETION, *, layers: int = LAYERS, rounds: int = ROUNDS
) -> list[Table]:
    """A minute and a half of CPU; the full grid takes some 15."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            cells = asyncio.run(_cells(one_label_folder(Path(scratch), layers), grid, completion, rounds))
    finally:
        torch.set_num_threads(threads)
    title = "Completions of {} to {} tokens scored in a CPU second".format(*completion)
    columns = (
        "prompt", "N", "pipeline", "by hand", "LocalScorer", "÷ pipeline", "÷ by hand", "ideal", "share of ideal",
        "largest difference",
    )  # fmt: skip
    return [Table(title, columns, [cell.row() for cell in cells]), bars.table(_bars(cells))]


@dataclass(frozen=True, slots=True)
class Timed:
    """One round: CPU seconds by each way, what the ideal would be, and how far rewards were apart."""

    pipeline: float
    by_hand: float
    ours: float
    ideal: float
    difference: float


@dataclass(frozen=True, slots=True)
class Cell:
    """All rounds of a prompt's length and a number of completions."""

    prompt: int
    n: int
    rounds: Sequence[Timed]

    @property
    def to_pipeline(self) -> float:
        return statistics.median(one.pipeline / one.ours for one in self.rounds)

    @property
    def to_by_hand(self) -> float:
        return statistics.median(one.by_hand / one.ours for one in self.rounds)

    @property
    def share_by_hand(self) -> float:
        """Of the ideal ratio, measured against padded batches."""
        return statistics.median(one.by_hand / one.ours / one.ideal for one in self.rounds)

    @property
    def share(self) -> float:
        """The same against the faster of the two: what padding costs would make it look better."""
        return statistics.median(min(one.pipeline, one.by_hand) / one.ours / one.ideal for one in self.rounds)

    def row(self) -> list[str | float | None]:
        ways = zip(*((one.pipeline, one.by_hand, one.ours) for one in self.rounds), strict=True)
        return [
            self.prompt,
            self.n,
            *(statistics.median(self.n / seconds for seconds in way) for way in ways),
            self.to_pipeline,
            self.to_by_hand,
            statistics.median(one.ideal for one in self.rounds),
            f"{self.share:.0%}",
            f"{max(one.difference for one in self.rounds):.0e}",
        ]


def _bars(cells: Sequence[Cell]) -> list[bars.Bar]:
    long = [cell for cell in cells if cell.prompt >= _FROM_PROMPT]
    wanted = f"share of the ideal ratio, prompts from {_FROM_PROMPT} tokens, worst cell, against"
    return [
        bars.Bar(f"{wanted} padded batches", 0.8, min((c.share_by_hand for c in long), default=None), at_least=True),
        bars.Bar(f"{wanted} the faster of the two", 0.8, min((c.share for c in long), default=None), at_least=True),
        bars.Bar("speed ÷ padded batch by hand, worst cell", 0.95, min(c.to_by_hand for c in cells), at_least=True),
    ]


async def _cells(source: str, grid: Grid, completion: tuple[int, int], rounds: int) -> list[Cell]:
    scorer = LocalScorer(source, device="cpu")
    await scorer.start()
    try:
        theirs = _Transformers(source)
        await _round(theirs, scorer, (grid.prompts[0], grid.counts[0]), completion, seed=-1)  # warms caches
        return [
            Cell(*shape, [await _round(theirs, scorer, shape, completion, seed) for seed in range(rounds)])
            for shape in product(grid.prompts, grid.counts)
        ]
    finally:
        await scorer.aclose()


async def _round(
    theirs: _Transformers, scorer: LocalScorer, shape: tuple[int, int], completion: tuple[int, int], seed: int
) -> Timed:
    prompt, completions = theirs.texts(*shape, completion, seed)
    started = time.process_time()
    one_by_one = theirs.pipeline(prompt, completions)
    first = time.process_time()
    by_hand = theirs.by_hand(prompt, completions)
    second = time.process_time()
    ours = [score.raw_reward for score in await scorer.score(prompt, completions)]
    ended = time.process_time()
    differences = [abs(own - other) for their in (one_by_one, by_hand) for own, other in zip(ours, their, strict=True)]
    return Timed(
        first - started, second - first, ended - second, theirs.ideal_ratio(prompt, completions), max(differences)
    )


class _Transformers:
    """What one would write without winnow."""

    def __init__(self, source: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

        with quiet_loading():
            self._tokenizer = AutoTokenizer.from_pretrained(source)
            self._model = AutoModelForSequenceClassification.from_pretrained(source).eval()
            self._pipeline = pipeline(
                "text-classification", model=self._model, tokenizer=self._tokenizer, function_to_apply="none"
            )

    def pipeline(self, prompt: Messages, completions: Sequence[Messages]) -> list[float]:
        texts = [self._templated(prompt, completion) for completion in completions]
        return [one["score"] for one in self._pipeline(texts, add_special_tokens=False)]

    def by_hand(self, prompt: Messages, completions: Sequence[Messages]) -> list[float]:
        import torch

        rewards: list[float] = []
        for start in range(0, len(completions), _BY_HAND):
            texts = [self._templated(prompt, completion) for completion in completions[start : start + _BY_HAND]]
            inputs = self._tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
            with torch.inference_mode():
                rewards += self._model(**inputs).logits.squeeze(-1).tolist()
        return rewards

    def texts(
        self, prompt: int, n: int, completion: tuple[int, int], seed: int
    ) -> tuple[list[Message], list[list[Message]]]:
        """A prompt of about so many tokens, the template's included, and `n` completions."""
        choice = random.Random(f"{seed}/{prompt}/{n}")
        frame = len(self._ids(self._templated([{"role": "user", "content": ""}], [])))

        def text(tokens: int) -> str:
            # A word has a token at least.
            ids = self._ids(" ".join(choice.choices(_TEXT.split(), k=tokens)))
            return str(self._tokenizer.decode(ids[:tokens]))

        return [{"role": "user", "content": text(max(prompt - frame, 1))}], [
            [{"role": "assistant", "content": text(choice.randint(*completion))}] for _ in range(n)
        ]

    def ideal_ratio(self, prompt: Messages, completions: Sequence[Messages]) -> float:
        shared = len(self._ids(self._templated(prompt, [])))
        total = sum(len(self._ids(self._templated(prompt, completion))) for completion in completions)
        return total / (total - (len(completions) - 1) * shared)

    def _templated(self, prompt: Messages, completion: Messages) -> str:
        return str(self._tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def one_label_folder(folder: Path, layers: int) -> str:
    """A one-label model that transformers and winnow load alike."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = resolve_base(DEFAULT_BASE)
    with quiet_loading(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.pad_token = "<|endoftext|>"
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, num_hidden_layers=layers, pad_token_id=tokenizer.pad_token_id
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
