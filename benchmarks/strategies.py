"""What the strategies save, and what that costs in reward: recorded completions, the shipped reward model, real HTTP.

`WINNOW_DATA=DIR python benchmarks/strategies.py`; DIR holds `candidates/*.jsonl.gz` with `prompt`, `completions`,
`systems`, `sampling`, `finish_reasons`. The samples of one model are replayed by an upstream process that counts the
words it wrote (`replay.py`), with winnow in this process before it. Rewards are kept in a file of the temporary folder:
scoring takes minutes on a CPU, and how fast it is shall not tell here. They are in deviations of the reference
completions, a truncated answer's less the penalty, as winnow chooses.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import hashlib
import json
import math
import os
import random
import socket
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
from prometheus_client import CollectorRegistry
from rich.console import Console

from benchmarks.processes import Server, started
from benchmarks.replay import words
from benchmarks.tables import Table
from feedback.records import Messages
from proxy.app import Parts, create_app
from proxy.config_loading import load_settings
from proxy.strategies.history import Prior, RewardHistory
from proxy.strategies.pruning import beginning
from proxy.strategies.stopping import next_wave
from proxy.upstreams.hosted import HostedUpstream
from reward.local import LocalScorer
from reward.manifest import FILE_NAME
from reward.model import default_folder
from reward.scorer import Score, Scorer
from winnow.console import table

_SYSTEM = "pythia-12b-sft-4"
_NUM_PROMPTS = 96
_NUM_RACED = 24
"""Prompts whose answers are compared by their beginnings too, each of which has to be scored."""
_NUM_SAMPLES = 10
_REFERENCE = 8
"""Best of so many is what all is compared with."""
_PENALTY = 1.0
_LENGTHS = (256, 512, 1024, 2048)
_ORDERS = 25
_CLIENTS = 10


@dataclass(frozen=True, slots=True)
class Recorded:
    """One prompt with its samples."""

    prompt: Messages
    texts: Sequence[str]
    reasons: Sequence[str]

    @property
    def key(self) -> str:
        return str(self.prompt[0]["content"])


class KeptScorer:
    """The shipped reward model, asked once for every text ever; what it said is kept in `file`."""

    def __init__(self, file: Path) -> None:
        self.name = "winnow-default"
        self._file = file
        self._kept: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        self._scorer: LocalScorer | None = None
        self._loading = asyncio.Lock()

    @property
    def ready(self) -> bool:
        return True

    async def start(self) -> None:
        """Loads nothing: all may be known already."""

    async def score(self, prompt: Messages, completions: Sequence[Messages]) -> list[Score]:
        keys = [hashlib.sha256(json.dumps([prompt, one]).encode()).hexdigest() for one in completions]
        missing = [position for position, key in enumerate(keys) if key not in self._kept]
        if missing:
            async with self._loading:
                if self._scorer is None:
                    self._scorer = LocalScorer("default", device="cpu")
                    await self._scorer.start()
            scores = await self._scorer.score(prompt, [completions[position] for position in missing])
            self._kept |= {keys[position]: asdict(score) for position, score in zip(missing, scores, strict=True)}
        return [Score(**self._kept[key]) for key in keys]

    def reward_at_percentile(self, percentile: float) -> float | None:
        return None

    async def aclose(self) -> None:
        """For the app, of which there are several in turn: the model stays."""
        self._file.write_text(json.dumps(self._kept))

    async def unload(self) -> None:
        await self.aclose()
        if self._scorer is not None:
            await self._scorer.aclose()


def load(folder: Path, seed: int = 0) -> list[Recorded]:
    """The same prompts each time; a model's greedy answer is left out, for it is no sample."""
    found: list[Recorded] = []
    for file in sorted((folder / "candidates").glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                at = [
                    position
                    for position, system in enumerate(record["systems"])
                    if system == _SYSTEM and record["sampling"][position] != "greedy"
                ][:_NUM_SAMPLES]
                if len(at) == _NUM_SAMPLES:
                    texts = [record["completions"][position][0]["content"] for position in at]
                    found.append(Recorded(record["prompt"], texts, [record["finish_reasons"][i] for i in at]))
    if not found:
        raise SystemExit(f"{folder}/candidates has no prompt with {_NUM_SAMPLES} samples of {_SYSTEM}")
    random.Random(seed).shuffle(found)
    return found[:_NUM_PROMPTS]


async def rewards_of(recorded: Sequence[Recorded], scorer: KeptScorer) -> list[list[float]]:
    """By prompt and sample, as winnow chooses by them. Beginnings are scored too, to be known where they are raced."""
    rewards = []
    for number, one in enumerate(recorded, start=1):
        raced = one.texts[:_REFERENCE] if number <= _NUM_RACED else ()
        begun = [beginning(text, length) for length in _LENGTHS for text in raced]
        known = await scorer.score(
            one.prompt, [[{"role": "assistant", "content": text}] for text in [*one.texts, *begun]]
        )
        scores = known[:_NUM_SAMPLES]
        rewards.append([
            score.reward - _PENALTY * (reason == "length") for score, reason in zip(scores, one.reasons, strict=True)
        ])  # fmt: skip
        print(f"\rscored {number} of {len(recorded)} prompts", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return rewards


def curve(rewards: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]) -> Table:
    """`adaptive`'s decisions over many orders of the samples, and best of n for comparison."""
    rng = random.Random(0)
    orders = [[rng.sample(range(_NUM_SAMPLES), _NUM_SAMPLES) for _ in range(_ORDERS)] for _ in rewards]
    rows: list[tuple[str, list[list[int]]]] = [
        (f"best of {n}", [[n] * _ORDERS for _ in rewards]) for n in (_REFERENCE, 7, 6, 5, 4)
    ]
    for cap in (_NUM_SAMPLES, _REFERENCE):
        for wave in (4, 2):
            for cost in (0.1, 0.11, 0.12, 0.13, 0.14, 0.15, 0.17, 0.2):
                name = f"adaptive, best_of {cap}, waves of {wave}, stop_cost {cost:g}"
                rows.append((name, _stops(rewards, orders, cap, wave, cost)))
    rows += [
        (f"the same without the route's sample: best_of {_NUM_SAMPLES}, waves of 4, stop_cost {cost:g}",
         _stops(rewards, orders, _NUM_SAMPLES, 4, cost, with_sample=False))
        for cost in (0.1, 0.15, 0.2)
    ]  # fmt: skip
    reference = _means(rewards, lengths, orders, rows[0][1])
    cells: list[list[str | float | None]] = []
    for name, counts in rows:
        reward, num, length = _means(rewards, lengths, orders, counts)
        cells.append([
            name, round(reward, 3), f"{reward / reference[0]:.1%}", round(reference[0] - reward, 3), round(num, 2),
            f"{1 - num / reference[1]:.0%}", f"{1 - length / reference[2]:.0%}",
        ])  # fmt: skip
    title = (
        f"adaptive: decisions over {_ORDERS} orders of {_NUM_SAMPLES} samples for {len(rewards)} prompts, "
        f"against best of {_REFERENCE}"
    )
    columns = ["", "mean reward", "of it", "lost", "candidates", "fewer candidates", "fewer words"]
    return Table(title, columns, cells)


def _means(
    rewards: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[int]],
    orders: Sequence[Sequence[Sequence[int]]],
    counts: Sequence[Sequence[int]],
) -> tuple[float, float, float]:
    """Of the best reward, the candidates drawn and their words, over all prompts and orders."""
    drawn = [
        (at, order[:count])
        for at, (mine, taken) in enumerate(zip(orders, counts, strict=True))
        for order, count in zip(mine, taken, strict=True)
    ]
    return (
        statistics.fmean(max(rewards[at][sample] for sample in samples) for at, samples in drawn),
        statistics.fmean(len(samples) for _, samples in drawn),
        statistics.fmean(sum(lengths[at][sample] for sample in samples) for at, samples in drawn),
    )


def _stops(
    rewards: Sequence[Sequence[float]],
    orders: Sequence[Sequence[Sequence[int]]],
    cap: int,
    wave: int,
    cost: float,
    *,
    with_sample: bool = True,
) -> list[list[int]]:
    """How many were drawn, by prompt and order. The history sees every prompt once an order, as a route would."""
    history = RewardHistory()
    counts: list[list[int]] = [[] for _ in rewards]
    for turn in range(_ORDERS):
        for at in random.Random(turn).sample(range(len(rewards)), len(rewards)):
            seen = [rewards[at][sample] for sample in orders[at][turn]]
            prior = history.prior()
            if not with_sample:
                prior = Prior(prior.mean, prior.between_variance, prior.within_variance, prior.weight)
            count = more = min(wave, cap)
            while more and count < cap:
                more = next_wave(seen[:count], count, prior, most=min(wave, cap - count), stop_cost=cost)
                count += more
            history.observe(seen[: min(wave, cap)])
            counts[at].append(count)
    return counts


@dataclass(frozen=True, slots=True)
class Way:
    """One way of asking, over HTTP."""

    name: str
    best_of: int
    strategy: str
    route: dict[str, Any]
    turns: int = 1


_BEST_OF_N = Way(f"best of {_REFERENCE}", _REFERENCE, "best_of_n", {})
STOPPING = (
    _BEST_OF_N,
    Way("best of 6", 6, "best_of_n", {}),
    Way("adaptive as set by default, best_of 10", 10, "adaptive", {}, 2),
    Way("adaptive, best_of 10, waves of 2", 10, "adaptive", {"wave_size": 2}, 2),
)
RACING = (
    _BEST_OF_N,
    *(
        Way(
            f"speculative, from {first} characters, keep {keep}",
            _REFERENCE,
            "speculative",
            {"prune_first_chars": first, "prune_keep": keep},
        )
        for first in (256, 512, 1024)
        for keep in (0.9, 0.75, 0.5)
    ),
)


async def over_http(recorded: Sequence[Recorded], scorer: Scorer, ways: Sequence[Way]) -> Table:
    """Every way in turn, each on the same completions in the same order, counted by the upstream."""
    rows: list[list[str | float | None]] = []
    reference: tuple[float, float, float] | None = None
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "recorded.json"
        told = {one.key: [list(pair) for pair in zip(one.texts, one.reasons, strict=True)] for one in recorded}
        file.write_text(json.dumps(told))
        with started("replay", ["-m", "benchmarks.replay", str(file)]) as upstream:
            for way in ways:
                print(f"asking: {way.name}", file=sys.stderr, flush=True)
                measured = await _ask_all(way, recorded, upstream, scorer)
                reference = reference or measured
                reward, num_words, num = measured
                rows.append([
                    way.name, round(reward, 3), f"{reward / reference[0]:.1%}", round(reference[0] - reward, 3),
                    round(num, 2), f"{1 - num / reference[2]:.0%}", f"{1 - num_words / reference[1]:.0%}",
                ])  # fmt: skip
    title = f"Through winnow and a real upstream: {len(recorded)} prompts, against best of {_REFERENCE}"
    columns = ["", "mean reward", "of it", "lost", "candidates", "fewer candidates", "fewer words written"]
    return Table(title, columns, rows)


async def _ask_all(
    way: Way, recorded: Sequence[Recorded], upstream: Server, scorer: Scorer
) -> tuple[float, float, float]:
    """The winners' mean reward, and words and candidates a prompt, as the upstream counted them on the last turn."""
    flags = {
        "upstream": {"url": upstream.base_url, "n_mode": "parallel"},
        "route": {"best_of": way.best_of, "strategy": way.strategy} | way.route,
    }
    settings = load_settings(flags=flags)
    parts = Parts({settings.default_upstream: HostedUpstream(settings.upstream)}, {"default": scorer})
    app = create_app(settings, parts, CollectorRegistry()).asgi
    # It listens from here on: whoever connects waits until the server has started.
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    port = listening.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        async with aiohttp.ClientSession() as session:
            for _ in range(way.turns):
                async with session.get(f"{upstream.base_url}/written") as fresh:
                    await fresh.read()
                places = asyncio.Semaphore(_CLIENTS)
                rewards = await asyncio.gather(*(_ask(session, port, one, places) for one in recorded))
            async with session.get(f"{upstream.base_url}/written") as answer:
                written = await answer.json()
    finally:
        server.should_exit = True
        await serving
    return statistics.fmean(rewards), written["words"] / len(recorded), written["completions"] / len(recorded)


async def _ask(session: aiohttp.ClientSession, port: int, one: Recorded, places: asyncio.Semaphore) -> float:
    body = {"model": "recorded", "messages": one.prompt, "winnow": {"return_candidates": True}}
    async with places, session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as answer:
        told = await answer.json()
        if answer.status != 200:
            raise RuntimeError(f"winnow answered {answer.status}: {told}")
    winnow = told["winnow"]
    winner = next(candidate for candidate in winnow["candidates"] if candidate["index"] == winnow["winner"])
    return float(winner["reward"]) - _PENALTY * (winner["finish_reason"] == "length")


async def run(folder: Path) -> AsyncIterator[Table]:
    """Each as soon as it is known. Raises `SystemExit` when the data is not there."""
    recorded = load(folder)
    # Another reward model, another file.
    model = hashlib.sha256((default_folder() / FILE_NAME).read_bytes()).hexdigest()[:16]
    scorer = KeptScorer(Path(tempfile.gettempdir()) / f"winnow-benchmark-rewards-{model}.json")
    try:
        rewards = await rewards_of(recorded, scorer)
        lengths = [[len(words(text)) for text in one.texts] for one in recorded]
        within = math.sqrt(statistics.fmean(map(statistics.variance, rewards)))
        first = curve(rewards, lengths)
        yield replace(first, title=f"{first.title}; rewards of one prompt deviate by {within:.2f}")
        yield await over_http(recorded, scorer, STOPPING)
        yield await over_http(recorded[:_NUM_RACED], scorer, RACING)
    finally:
        await scorer.unload()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=os.environ.get("WINNOW_DATA"), help="folder; else $WINNOW_DATA")
    folder = parser.parse_args().data
    if folder is None:
        parser.error("name the folder with the data, or set WINNOW_DATA")
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    asyncio.run(_print(console, Path(folder)))


async def _print(console: Console, folder: Path) -> None:
    async for one in run(folder):
        console.print(one.title, markup=False)
        console.print(table(one.columns, one.rows), "")


if __name__ == "__main__":
    main()
