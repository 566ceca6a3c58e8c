"""All benchmarks, printed as tables of ratios: `make bench`, or `python benchmarks/run.py gateway`.

`--full` measures the whole grid where a part has more than it shows by default, which takes much longer; `frontier`
runs only when named. Nothing is written unless `--output` names a file. Ratios are measured side by side in one run and
carry over to other machines; milliseconds do not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from benchmarks import (
    encoders,
    gateway,
    gateway_memory,
    policies,
    ppo,
    ppo_frontier,
    ranking,
    scoring,
    trainers,
    waiting,
)
from benchmarks.tables import Table
from winnow.console import table
from winnow.version import __version__

_PARTS: dict[str, Callable[[], list[Table]]] = {
    "gateway": gateway.run,
    "memory": gateway_memory.run,
    "scoring": scoring.run,
    "encoders": encoders.run,
    "waiting": waiting.run,
    "ranking": ranking.run,
    "trainers": trainers.run,
    "training": policies.run,
    "ppo": ppo.run,
}
_BY_NAME: dict[str, Callable[[], list[Table]]] = {"frontier": ppo_frontier.run}
"""Run only when named."""
_FULL: dict[str, Callable[[], list[Table]]] = {
    "scoring": lambda: scoring.run(scoring.FULL),
    "training": policies.run_full,
    "ppo": ppo.run_full,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="which to run; all, if none is named")
    parser.add_argument("--full", action="store_true", help="the whole grid of scoring: some 15 minutes of CPU")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the tables, with the hardware, here")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(f"winnow {__version__} on {hardware()}\n", markup=False)
    tables: list[Table] = []
    for part in arguments.parts or list(_PARTS):
        for one in ((arguments.full and _FULL.get(part)) or (_PARTS | _BY_NAME)[part])():
            tables.append(one)
            console.print(one.title, markup=False)
            console.print(table(one.columns, one.rows), "")
    if arguments.output is not None:
        report = {"version": __version__, "hardware": hardware(), "tables": [dataclasses.asdict(one) for one in tables]}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def hardware() -> str:
    """What the figures depend on."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{count} × {_processor()}, {platform.system()}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
