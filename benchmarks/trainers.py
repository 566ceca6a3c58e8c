"""Training on rankings: `winnow train reward` beside TRL's RewardTrainer on all pairs, same data and same model.

Both take one pass in as many steps, each step over the same number of rankings' comparisons, with the same peak of the
learning rate and a cosine down to nothing; neither recomputes activations. CPU seconds on one thread of the steps
alone: of a run of winnow's, what a run of a single step takes is taken off, which is reading, loading, encoding and
writing. Each of TRL's two models goes through the same measuring of accuracy on held-out rankings.

The model is the embedded base cut to its first layers, trained in full. In the rankings of K completions the texts are
people's and the order is a rule, shorter is better: a rule is learnt in a few steps, so that accuracies say whether
both learn the same. With `WINNOW_DATA` rankings by people are measured, too.
"""

from __future__ import annotations

import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import bars, peers, scoring
from benchmarks.tables import Table
from feedback.jsonl import read_records, write_records
from feedback.rankings import ComparisonGroup, group_comparisons
from feedback.records import parse_preference, parse_ranking
from reward.manifest import Accuracy
from training.evaluation import accuracy_of, pair_outcomes

LAYERS = 2
LEARNING_RATE = 1e-4
WARMUP_SHARE = 0.1
_SCRIPT = Path(__file__).with_name("trl_script.py")
_TEXTS = Path(__file__).parents[1] / "tests" / "data"
_FACTORS = {4: 4.0, 8: 8.0}
"""How many times as many rankings a second it shall be, by the number of completions."""


Record = Mapping[str, Any]
"""A ranking as it stands in a file."""


@dataclass(frozen=True, slots=True)
class Data:
    """Rankings to train on and to measure by. `bar`: what the ratio of speeds has to reach, if anything."""

    name: str
    train: Sequence[Record]
    validation: Sequence[Record]
    step: int
    """Rankings a step."""
    bar: float | None = None

    @property
    def steps(self) -> int:
        return math.ceil(len(self.train) / self.step)


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of one way."""

    rankings_per_s: float
    """Of CPU time."""
    accuracy: Accuracy


def run(sizes: Sequence[tuple[int, int]] = ((4, 64), (8, 24)), *, layers: int = LAYERS) -> list[Table]:
    """Some five minutes of CPU, most of them TRL's. `sizes`: completions of a ranking, and rankings to train on."""
    import torch

    sets = [ruled(count, rankings, rankings_to_measure=32) for count, rankings in sizes]
    if home := os.environ.get("WINNOW_DATA"):
        sets.append(_by_people(Path(home) / "rankings"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with peers.library(peers.TRL, _SCRIPT) as trl, tempfile.TemporaryDirectory() as scratch:
            if trl is None:
                return []
            model = scoring.one_label_folder(Path(scratch) / "base", layers)
            found = []
            for number, data in enumerate(sets):
                ours, theirs = _both(trl, model, data, Path(scratch) / str(number))
                found.append((data, ours, theirs))
                # Minutes go by until the next: what is known shall not be lost with it.
                print(f"{data.name}: {ours.rankings_per_s / theirs.rankings_per_s:.2f} × TRL", file=sys.stderr)
    finally:
        torch.set_num_threads(threads)
    columns = ["rankings", "by", "rankings a CPU second", "÷ TRL", "validation accuracy", "95 % interval"]
    rows = [_row(data, way, one, theirs) for data, ours, theirs in found for way, one in _ways(trl, ours, theirs)]
    held = [bar for data, ours, theirs in found for bar in _bars(data, ours, theirs)]
    return [Table(f"Training on rankings, {layers} layers, one thread", columns, rows), bars.table(held)]


def ruled(count: int, rankings: int, *, rankings_to_measure: int) -> Data:
    """Rankings of `count` pieces of people's answers, 16 to 92 words, the shorter the better. Prompts: 48 to 144."""
    choice = random.Random(count)
    known = list(read_records(sorted(_TEXTS.glob("*_preferences.*.jsonl.gz")), parse_preference))
    words = [word for one in known for message in one.chosen for word in str(message["content"]).split()]

    def piece(length: int) -> str:
        start = choice.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    def ranking(number: int) -> Record:
        lengths = choice.sample(range(16, 96, 4), count)
        return {
            "prompt": [{"role": "user", "content": f"{number}. {piece(choice.randint(48, 144))}"}],
            "completions": [[{"role": "assistant", "content": piece(length)}] for length in lengths],
            "ranks": [sorted(lengths).index(length) + 1 for length in lengths],
        }

    made = [ranking(number) for number in range(rankings + rankings_to_measure)]
    return Data(f"K = {count}, by a rule", made[:rankings], made[rankings:], step=8, bar=_FACTORS.get(count))


def _by_people(home: Path) -> Data:
    train, validation = (
        list(read_records([home / f"oasst_en.{split}.jsonl.gz"], dict)) for split in ("train", "validation")
    )
    return Data("K = 2 to 9, by people", train, validation, step=8)


def pairs(records: Sequence[Record]) -> list[dict[str, Any]]:
    """All untied pairs of the rankings, as whole conversations."""
    return [
        {
            "chosen": [*group.prompt, *group.completions[pair.better]],
            "rejected": [*group.prompt, *group.completions[pair.worse]],
        }
        for group in _groups(records)
        for pair in group.pairs
    ]


def _groups(records: Sequence[Record]) -> list[ComparisonGroup]:
    return group_comparisons(map(parse_ranking, records))


def _both(trl: peers.Library, model: str, data: Data, scratch: Path) -> tuple[Trained, Trained]:
    """Winnow's way and TRL's."""
    scratch.mkdir()
    ours = _ours(model, data, scratch)
    theirs = trl.ask(
        model=model,
        pairs=pairs(data.train),
        output=str(scratch / "trl"),
        steps=data.steps,
        learning_rate=LEARNING_RATE,
        warmup_steps=math.ceil(WARMUP_SHARE * data.steps),
    )
    return ours, Trained(len(data.train) / theirs["cpu_s"], _accuracy(scratch / "trl", data.validation))


def _ours(model: str, data: Data, scratch: Path) -> Trained:
    write_records(scratch / "train.jsonl", data.train)
    write_records(scratch / "reference.jsonl", data.validation[:1])
    whole = _cpu_s_of_training(model, data, scratch, "whole", epochs=1.0)
    single = _cpu_s_of_training(model, data, scratch, "single", epochs=1e-6)  # the least is one step
    accuracy = _accuracy(scratch / "whole" / "model", data.validation)
    return Trained((len(data.train) - data.step) / (whole - single), accuracy)


def _cpu_s_of_training(model: str, data: Data, scratch: Path, name: str, *, epochs: float) -> float:
    from training.options import RewardOptions
    from training.reward_model import train_reward_model

    options = RewardOptions(
        base=model,
        train=[str(scratch / "train.jsonl")],
        validation=[str(scratch / "reference.jsonl")],
        output=str(scratch / name),
        tuning="full",
        epochs=epochs,
        global_batch_size=data.step,
        learning_rate=LEARNING_RATE,
        warmup_share=WARMUP_SHARE,
        final_rate_share=0.0,
        device="cpu",
        # Once, at the end, on one ranking: accuracy is measured here.
        eval_every=10**6,
        save_every=10**6,
    )
    started = time.process_time()
    train_reward_model(options)
    return time.process_time() - started


def _accuracy(folder: Path, records: Sequence[Record]) -> Accuracy:
    """By the reward model of a folder, whoever wrote it."""
    from reward.model import load_reward_model

    model = load_reward_model(str(folder), device="cpu")
    groups = _groups(records)
    items = [
        item
        for group in groups
        for item in model.shared([model.renderer.render(group.prompt, one) for one in group.completions])
    ]
    return accuracy_of(pair_outcomes(groups, model.score_all(items)))


def _ways(trl: peers.Library, ours: Trained, theirs: Trained) -> list[tuple[str, Trained]]:
    return [(trl.name, theirs), ("winnow", ours)]


def _row(data: Data, way: str, one: Trained, theirs: Trained) -> list[str | float | None]:
    found = one.accuracy
    return [
        data.name,
        way,
        one.rankings_per_s,
        one.rankings_per_s / theirs.rankings_per_s,
        f"{found.accuracy:.1%}",
        f"{found.low:.1%} to {found.high:.1%}",
    ]


def _bars(data: Data, ours: Trained, theirs: Trained) -> list[bars.Bar]:
    speed = ours.rankings_per_s / theirs.rankings_per_s
    wanted = [] if data.bar is None else [bars.Bar(f"{data.name}: rankings a second ÷ TRL", data.bar, speed, "", True)]
    # No worse: the intervals overlap, or ours is the higher one.
    gap = ours.accuracy.high - theirs.accuracy.low
    return [*wanted, bars.Bar(f"{data.name}: upper end of the accuracy − lower end of TRL's", 0.0, gap, "", True)]
