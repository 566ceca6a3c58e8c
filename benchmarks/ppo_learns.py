"""PPO on a real model: does the held-out score rise, and at which KL?

`WINNOW_DATA=DIR python benchmarks/ppo_learns.py` runs

`training/configs/ppo-capitalised.yaml` on beginnings of real prompts, a run for each seed, some ten CPU-minutes each.
Not part of `make bench`: the prompts are not in the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.run import hardware
from benchmarks.tables import Table
from feedback.jsonl import read_records, write_records
from feedback.records import Prompt, parse_prompt
from reward.bases import DEFAULT_BASE, resolve_base
from reward.rendering import content_text
from training.options import load_options
from training.ppo import train_ppo
from training.ppo_options import PpoOptions
from winnow.console import table

CONFIGURATION = Path(__file__).parent.parent / "training" / "configs" / "ppo-capitalised.yaml"
SOURCES = ("preferences/hh_harmless", "preferences/hh_helpful")
PROMPT_TOKENS = 16
HELD_OUT = 128
BARS = "bars: each seed at least .25, their mean .33; exact KL at most 6 nats; distinct at least .80"


@dataclass(frozen=True, slots=True)
class Run:
    """What one seed came to."""

    seed: int
    before: dict[str, float]
    after: dict[str, float]
    cpu_s: float
    wall_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="override", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, help="keep the runs in this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = arguments.output or Path(scratch)
        files = write_prompts(Path(os.environ["WINNOW_DATA"]), home)
        runs = [learn(seed, files, home, arguments.override) for seed in arguments.seeds]
    Console(width=140, highlight=False).print(hardware(), markup=False)
    found = as_table(runs)
    Console(width=140, highlight=False).print(found.title, table(found.columns, found.rows), BARS, sep="\n")


def write_prompts(data: Path, home: Path) -> tuple[Path, Path]:
    """The first tokens of every prompt that has so many; training and held out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_base(DEFAULT_BASE))

    def beginnings(part: str) -> list[dict[str, str]]:
        records: list[Prompt] = list(
            read_records([data / f"{source}.{part}.jsonl.gz" for source in SOURCES], parse_prompt)
        )
        texts = dict.fromkeys(content_text(record.prompt[0]) for record in records)
        encoded = [tokenizer(text)["input_ids"][:PROMPT_TOKENS] for text in texts]
        return [{"prompt": tokenizer.decode(ids)} for ids in encoded if len(ids) == PROMPT_TOKENS]

    train, held_out = beginnings("train"), beginnings("validation")[:HELD_OUT]
    missing = HELD_OUT - len(held_out)
    files = home / "prompts.jsonl", home / "held-out.jsonl"
    write_records(files[0], train[missing:])
    write_records(files[1], [*held_out, *train[:missing]])
    return files


def learn(seed: int, files: tuple[Path, Path], home: Path, override: Sequence[str]) -> Run:
    """One run from start to end."""
    run = home / f"seed-{seed}"
    settings = [f"prompts=[{files[0]}]", f"eval_prompts=[{files[1]}]", f"output={run}", f"seed={seed}", *override]
    cpu, wall = time.process_time(), time.perf_counter()
    train_ppo(load_options(PpoOptions, CONFIGURATION, settings))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    first, *_, last = (line for line in lines if "eval_kl" in line)
    return Run(seed, first, last, cpu, wall)


def as_table(runs: Sequence[Run]) -> Table:
    """A row a seed, and their means."""

    def cells(before: Sequence[dict[str, float]], after: Sequence[dict[str, float]]) -> list[float]:
        def mean(lines: Sequence[dict[str, float]], name: str) -> float:
            return sum(line[name] for line in lines) / len(lines)

        return [
            round(mean(before, "eval_score"), 3),
            round(mean(after, "eval_score"), 3),
            round(mean(after, "eval_kl"), 2),
            round(mean(after, "eval_kl_k1"), 2),
            round(mean(before, "eval_distinct"), 3),
            round(mean(after, "eval_distinct"), 3),
        ]

    rows: list[list[str | float | None]] = [
        [str(run.seed), *cells([run.before], [run.after]), round(run.cpu_s), round(run.wall_s)] for run in runs
    ]
    rows.append(["mean", *cells([run.before for run in runs], [run.after for run in runs]), None, None])
    return Table(
        "PPO on capitalised words, SmolLM2-135M, held-out prompts",
        ["seed", "score before", "after", "exact KL", "k1", "distinct before", "after ", "CPU-s", "wall s"],
        rows,
    )


if __name__ == "__main__":
    main()
