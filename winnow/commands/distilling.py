"""What `winnow train distill` is handed: a way to draw completions, and a way to score them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from feedback.records import Completions
from training.sampling import Drawn, Outcome, Task
from winnow.commands import drawing
from winnow.commands.models import load_model
from winnow.commands.score import scored_records
from winnow.generation import Origin, Pace, origin_of

if TYPE_CHECKING:
    from training.distill import DistillOptions, Draw, Score

_MAX_FAILURES_IN_A_ROW = 8


def draw_with(options: DistillOptions) -> Draw:
    """From the teacher, or from the policy itself."""
    defaults = Origin(device=options.device, trust_remote_code=options.trust_remote_code)
    origin = origin_of(options.teacher or options.base, defaults, options.teacher_key_variable)
    pace = Pace(options.samples_at_once, options.calls_per_minute)

    def draw(begin: Callable[[str], Sequence[Task]], keep: Callable[[Task, Sequence[Drawn]], None]) -> Outcome:
        outcome = drawing.draw(
            origin,
            options.sampling,
            pace,
            begin,
            keep,
            max_failures_in_a_row=_MAX_FAILURES_IN_A_ROW,
            label="sampling",
        )
        drawing.show_failures(outcome)
        return outcome

    return draw


def score_with(options: DistillOptions) -> Score:
    """By the reward model, which is gone from memory when all is scored."""

    def score(parts: Iterable[Sequence[Completions]]) -> Iterator[list[dict[str, Any]]]:
        model = load_model(
            options.reward_model, device=options.device, dtype="auto", trust_remote_code=options.trust_remote_code
        )
        for records in parts:
            yield scored_records(model, records, None)

    return score
