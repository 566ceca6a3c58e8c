"""Tasks that a tiny model learns in seconds, as files, options and records."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from feedback.jsonl import Skipped
from feedback.rankings import ComparisonGroup, Pair
from feedback.records import Messages
from reward.model import load_reward_model
from training.comparisons import read_comparisons
from training.options import RewardOptions

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ZIG, ZAG = "France", "lazy"
"""Two words, each a single token, that stand nowhere else. A completion that holds the wanted one is better."""


def write_preferences(path: Path, count: int, *, seed: int, source: str = "zig", wanted: str = ZIG) -> Path:
    """Pairs in which the better completion holds `wanted` and the worse one the other word."""
    rng = random.Random(seed)
    other = ZAG if wanted == ZIG else ZIG
    records = []
    for _ in range(count):
        records.append(
            {
                "source": source,
                "prompt": f"{source} {' '.join(rng.choices(WORDS, k=5))}",
                "chosen": _sentence(rng, wanted),
                "rejected": _sentence(rng, other),
            }
        )
    return write_lines(path, records)


def write_rankings(path: Path, count: int, *, seed: int, source: str = "zig", num_completions: int = 4) -> Path:
    """Rankings in which more occurrences of `ZIG` are better; two completions tie."""
    rng = random.Random(seed)
    records = []
    for _ in range(count):
        amounts = [*range(num_completions - 1), 0]
        rng.shuffle(amounts)
        records.append(
            {
                "source": source,
                "prompt": f"{source} {' '.join(rng.choices(WORDS, k=5))}",
                "completions": [_sentence(rng, *[ZIG] * amount) for amount in amounts],
                "ranks": [num_completions - 1 - amount for amount in amounts],
            }
        )
    return write_lines(path, records)


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def options(
    base: Path | str, output: Path, train: Sequence[Path], validation: Sequence[Path] = (), **more: Any
) -> RewardOptions:
    """Settings for a tiny model on the CPU."""
    chosen: dict[str, Any] = {
        "base": str(base),
        "output": str(output),
        "train": [str(path) for path in train],
        "validation": [str(path) for path in validation],
        "device": "cpu",
        "mixed_precision": "no",
        "max_length": 96,
        "seed": 3,
    }
    return RewardOptions.model_validate({**chosen, **more})


def read_log(run: Path) -> list[dict[str, float]]:
    """Lines of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def step_losses(run: Path) -> dict[int, float]:
    """Loss by step."""
    return {int(line["step"]): line["loss"] for line in read_log(run) if "loss" in line}


def group(num_completions: int, pairs: Sequence[Pair], source: str = "data", prompt: str = "p") -> ComparisonGroup:
    """A group of different short completions."""
    return ComparisonGroup(
        [{"role": "user", "content": prompt}],
        [[{"role": "assistant", "content": f"{WORDS[i % 10]} {i}"}] for i in range(num_completions)],
        pairs,
        source,
    )


def completion_pairs(path: Path) -> list[tuple[Messages, Messages, Messages]]:
    """(prompt, better, worse) of every pair of a file."""
    groups = read_comparisons([str(path)], False, Skipped())
    return [(g.prompt, g.completions[p.better], g.completions[p.worse]) for g in groups for p in g.pairs]


def write_config(path: Path, chosen: RewardOptions) -> Path:
    """The settings as a file for the command line."""
    path.write_text(yaml.safe_dump(chosen.model_dump(mode="json")), encoding="utf-8")
    return path


def command(*arguments: str | Path) -> list[str]:
    """The command line of a winnow command in a process of its own."""
    return [sys.executable, "-m", "winnow", *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread, as in this process: sums are then added in one order, and results are equal bit by bit."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _sentence(rng: random.Random, *marks: str) -> str:
    words = [*rng.choices(WORDS, k=rng.randint(3, 6)), *marks]
    rng.shuffle(words)
    return " ".join(["A", *words])


def mean_gap(model: Path, data: Path) -> float:
    """Raw reward of the better completion less that of the worse one, on average over the pairs of a file."""
    loaded = load_reward_model(str(model), device="cpu")
    pairs = completion_pairs(data)
    better = loaded.score_all([loaded.renderer.render(prompt, good) for prompt, good, _ in pairs])
    worse = loaded.score_all([loaded.renderer.render(prompt, bad) for prompt, _, bad in pairs])
    return (sum(better) - sum(worse)) / len(pairs)
