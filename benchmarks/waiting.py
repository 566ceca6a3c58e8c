"""How long the judged answer takes after the last candidate, with the shipped reward model and a slow upstream.

`late` scores all candidates together after the last, as `route.score_early: false` does; `early` scores each as it
arrives, and encodes the prompt before the first does. The upstream is a schedule: candidates come one every `gap_s`
after a while of writing, or all at once (one upstream call with `n`), where only the prompt can be done before. Times
are wall times on one thread, so that they, unlike their ratio, depend on what else the machine does. Ways take turns,
and no two requests share a prompt.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.tables import Table
from feedback.records import Message
from proxy.candidates import Call, Candidate
from proxy.judging import Judge
from proxy.prompts import PromptPart
from proxy.validity import Rules
from reward.local import LocalScorer

_WORDS = (
    "the of to and a in is it you that he was for on are with as his they be at one have this from or had by hot but "
    "some what there we can out other were all your when up use word how said an each she which do their time if will "
    "way about many then them would write like so these her long make thing see him two has look more day could go come"
)
_COLUMNS = ("prompt words", "N", "candidates come", "late, s", "early, s", "early ÷ late")


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of request. Words, nearly all of them one token each."""

    prompt: int
    n: int
    gap_s: float
    """Between two candidates; 0: they come at once."""
    completion: int = 128
    first_s: float = 1.0
    """Of writing before the first candidate."""


SHAPES = (
    Shape(64, 4, 0.5),
    Shape(512, 4, 0.5),
    Shape(512, 8, 0.5),
    Shape(1024, 4, 0.5, first_s=2.0),
    Shape(512, 4, 0.0),
    Shape(1024, 4, 0.0, first_s=2.0),
)


def run(shapes: Sequence[Shape] = SHAPES, rounds: int = 3, source: str = "default") -> list[Table]:
    """Some two minutes, a good part of them waiting. `source`: the reward model."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = asyncio.run(_rows(source, shapes, rounds))
    finally:
        torch.set_num_threads(threads)
    return [Table("From the last candidate to the verdict, on one CPU thread", _COLUMNS, rows)]


async def _rows(source: str, shapes: Sequence[Shape], rounds: int) -> list[list[str | float | None]]:
    scorer = LocalScorer(source, device="cpu")
    await scorer.start()
    try:
        await _request(scorer, Shape(8, 1, 0.0, 8, 0.0), seed=-1, early=False)  # warms caches
        return [await _row(scorer, shape, rounds) for shape in shapes]
    finally:
        await scorer.aclose()


async def _row(scorer: LocalScorer, shape: Shape, rounds: int) -> list[str | float | None]:
    late, early = [], []
    for seed in range(rounds):
        late.append(await _request(scorer, shape, seed, early=False))
        early.append(await _request(scorer, shape, seed, early=True))
    come = f"one in {shape.gap_s:g} s" if shape.gap_s else "at once"
    ratio = statistics.median(one / other for one, other in zip(early, late, strict=True))
    return [shape.prompt, shape.n, come, statistics.median(late), statistics.median(early), ratio]


async def _request(scorer: LocalScorer, shape: Shape, seed: int, *, early: bool) -> float:
    """Seconds from the last candidate to the verdict. Raises `RuntimeError` where one was not scored."""
    choice = random.Random(f"{seed}/{shape.prompt}/{shape.n}/{shape.gap_s}")
    # The first words set the two ways' prompts apart, so that neither finds what the other left.
    prompt: list[Message] = [{"role": "user", "content": f"{early} " + _text(choice, shape.prompt)}]
    answers = [_text(choice, shape.completion) for _ in range(shape.n)]
    candidates = [
        Candidate(index, Call(0.0), choice={"message": {"role": "assistant", "content": answer}})
        for index, answer in enumerate(answers)
    ]
    judge = Judge(scorer, Rules(), "error", strips_echo=False, early=early, expects=early)
    loop = asyncio.get_running_loop()
    async with judge.hearing(PromptPart(prompt)) as hearing:
        await asyncio.sleep(shape.first_s)
        for candidate in candidates[:-1]:
            if shape.gap_s:
                hearing.arrived(candidate)
                await asyncio.sleep(shape.gap_s)
        last = loop.time()
        verdict = await hearing.judge(candidates, None)
        waited = loop.time() - last
    if not all(one.score is not None for one in verdict.judged):
        raise RuntimeError("a candidate was not scored")
    return waited


def _text(choice: random.Random, words: int) -> str:
    known = _WORDS.split()
    return " ".join(choice.choice(known) for _ in range(words))
