"""What the commands that draw completions share: their options, and drawing under a progress bar."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.sampling import Drawn, Outcome, Sampling, Task, draw_all
from winnow.console import CommandError, progress_console
from winnow.generation import Completer, Origin, Pace, completions_of

_SHOWN_FAILURES = 20

Temperature = Annotated[float | None, typer.Option(min=0, help="Of sampling; the model's own, if not given.")]
TopP = Annotated[float | None, typer.Option(min=0, max=1, help="Share of the probability to draw from.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Longest completion; of a local model 512, if not given.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends a completion; may be repeated.")]
Seed = Annotated[int | None, typer.Option(help="Draws the same again, as far as the model's server can.")]
Body = Annotated[str | None, typer.Option(metavar="JSON", help='More members of each request, such as {"best_of": 4}.')]
AtOnce = Annotated[int, typer.Option(min=1, help="Calls at once.")]
PerMinute = Annotated[float | None, typer.Option(min=0.01, help="Calls a minute at most; without, no limit.")]
MaxRetries = Annotated[int, typer.Option(min=0, help="How often failed calls of a prompt are made again.")]
MaxWait = Annotated[
    float, typer.Option(min=0, help="Longest wait before one of them, in seconds; the server may ask for it.")
]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds for one call.")]
MaxFailuresInARow = Annotated[int, typer.Option(min=1, help="Stop when so many prompts failed one after the other.")]


def sampling_of(
    count: int,
    temperature: float | None,
    top_p: float | None,
    max_tokens: int | None,
    stop: Sequence[str] | None,
    seed: int | None,
    body: str | None,
) -> Sampling:
    """The options as one record. Raises `CommandError`."""
    if temperature == 0 and count > 1:
        raise CommandError(f"--temperature 0 gives {count} times the same completion: ask for one, or raise it")
    return Sampling(count, temperature, top_p, max_tokens, tuple(stop or ()), seed, _members(body))


def _members(body: str | None) -> dict[str, Any]:
    if body is None:
        return {}
    try:
        members = json.loads(body)
    except ValueError as error:
        raise CommandError(f"--body: is no JSON: {error}") from error
    if not isinstance(members, dict):
        raise CommandError("--body: must be a JSON object")
    ours = sorted({"model", "messages", "n", "stream", "seed"} & members.keys())
    if ours:
        raise CommandError(f"--body: {ours[0]} has an option of its own, or none")
    return members


def draw(
    origin: Origin,
    sampling: Sampling,
    pace: Pace,
    begin: Callable[[str], Sequence[Task]],
    keep: Callable[[Task, Sequence[Drawn]], None],
    *,
    max_failures_in_a_row: int,
    label: str = "drawing",
) -> Outcome:
    """Opens the place, asks it for what `begin` says is missing (told the model's name), and hands on what comes.

    A place that nothing is wanted of is not opened. Raises `CommandError` where it cannot be opened.
    """
    # Failures are told by prompt, in the end; what the proxy logs of each call would stand between.
    logging.getLogger("proxy").addHandler(logging.NullHandler())
    known = None if origin.known_model is None else begin(origin.known_model)
    if known is not None and not known:
        return Outcome([])

    async def run() -> Outcome:
        with progress_console().status("Loading the model …" if origin.base_url is None else "Connecting …") as status:
            async with completions_of(origin, sampling, pace) as completer:
                status.stop()
                return await _drawn(completer, begin(completer.model) if known is None else known)

    async def _drawn(completer: Completer, tasks: Sequence[Task]) -> Outcome:
        console = progress_console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        tokens = TextColumn("{task.fields[tokens]} tokens")
        with Progress(*columns, tokens, console=console, disable=not console.is_terminal, transient=True) as progress:
            bar = progress.add_task(label, total=len(tasks), tokens=0)
            return await draw_all(
                tasks,
                completer,
                sampling,
                keep,
                at_once=pace.at_once,
                max_failures_in_a_row=max_failures_in_a_row,
                on_done=lambda: progress.update(bar, advance=1, tokens=completer.num_tokens),
            )

    return asyncio.run(run())


def show_failures(outcome: Outcome) -> None:
    """The prompts that have no completions, by file and line, on standard error."""
    console = progress_console()
    for failure in outcome.failures[:_SHOWN_FAILURES]:
        console.print(f"{failure.place}: {' '.join(failure.problem.split())}", markup=False, soft_wrap=True)
    if len(outcome.failures) > _SHOWN_FAILURES:
        console.print(f"… and {len(outcome.failures) - _SHOWN_FAILURES} more")
