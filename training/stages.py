"""Stages of a run on several processes: trainers run on all of them, all else on the first."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

LOOK_EVERY_S = 0.5


def made_by_first(accelerator: Accelerator, target: Path, make: Callable[[], object]) -> None:
    """Returns when `target` is there: the first process makes it unless it is, whole or not at all.

    The others look out for it instead of meeting the first: a barrier has a time limit, a stage may take hours. Where
    the first fails, `torchrun` ends them.
    """
    if accelerator.is_main_process:
        if not target.exists():
            make()
        return
    while not target.exists():
        time.sleep(LOOK_EVERY_S)
