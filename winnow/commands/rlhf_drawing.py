"""How the loop of RLHF gets completions: from its policies, by the engine that serves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from training.rlhf import Draw
from training.sampling import Draft, Sampling, Task
from winnow.commands import drawing
from winnow.console import FAILED, CommandError
from winnow.generation import Origin, Pace

_AT_ONCE = 16
"""Prompts in the engine at a time; it batches their completions."""


def drawer(device: str) -> Draw:
    """Draws on this device."""

    def draw(policy: str, tasks: Sequence[Task], sampling: Sampling, target: Path) -> None:
        with Draft(target, tasks, sampling) as draft:
            outcome = drawing.draw(
                Origin(model=policy, device=device),
                sampling,
                Pace(at_once=_AT_ONCE),
                draft.begin,
                draft.keep,
                max_failures_in_a_row=1,
            )
            if outcome.failures:
                drawing.show_failures(outcome)
                raise CommandError(f"{policy}: gave no completion of {outcome.failures[0].place}", FAILED)
            draft.finish(draft.records())

    return draw
