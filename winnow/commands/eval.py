"""`winnow eval …`: language models against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from feedback.jsonl import DataError, located_records, write_records
from feedback.records import Completions, Preference, Ranking, parse_preference, parse_ranking
from training.sampling import Task, prompt_key, read_tasks
from winnow.commands import drawing
from winnow.commands.contestants import Contestant, Drawing, completions_by_key, contestant, recorded_prompts
from winnow.commands.models import Device, Dtype, TrustRemoteCode, load_model
from winnow.commands.reward_tables import p
from winnow.commands.score import scored_records
from winnow.console import FAILED, CommandError, out, print_json, say, table
from winnow.generation import KEY_VARIABLE, Origin, Pace

if TYPE_CHECKING:
    from reward.model import RewardModel
    from training.winrate import Comparison, Meeting, Share, Sides

    _Met = tuple[Task, Sides]
    """A prompt with both models' completions."""

Files = list[Path] | None
app = typer.Typer(no_args_is_help=True, help="Language models against each other.")


@app.callback()
def _group() -> None:
    """Keeps `eval` a group while it has a single command."""


@app.command()
def compare(
    a: Annotated[str, typer.Option(help="A model: URL[#MODEL], folder, hub id, package:NAME, or file of completions.")],
    b: Annotated[str, typer.Option(help="The model to compare it with.")],
    prompts: Annotated[
        Files, typer.Option(help="Files of prompts; may be left out where a model is a file of completions.")
    ] = None,
    count: Annotated[int, typer.Option("-k", "--count", min=1, help="Completions a prompt and model.")] = 1,
    reward_model: Annotated[str, typer.Option(help="The judge: folder, hub id, or `default`.")] = "default",
    judgements: Annotated[
        Files, typer.Option(help="Let people judge instead: preferences or rankings of these completions.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write each prompt's result here.")] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="Folder for what is drawn (a.jsonl, b.jsonl); a killed comparison goes on there."),
    ] = None,
    require_better: bool = typer.Option(False, "--require-better", help="Exit 1 unless --a is significantly better."),
    temperature: drawing.Temperature = None,
    top_p: drawing.TopP = None,
    max_tokens: drawing.MaxTokens = None,
    stop: drawing.Stop = None,
    seed: drawing.Seed = None,
    a_key_variable: Annotated[
        str, typer.Option(help="Environment variable with the key of --a's server.")
    ] = KEY_VARIABLE,
    b_key_variable: Annotated[
        str, typer.Option(help="Environment variable with the key of --b's server.")
    ] = KEY_VARIABLE,
    at_once: drawing.AtOnce = 8,
    per_minute: drawing.PerMinute = None,
    max_retries: drawing.MaxRetries = 6,
    max_wait_s: drawing.MaxWait = 300.0,
    timeout_s: drawing.Timeout = 600.0,
    max_failures_in_a_row: drawing.MaxFailuresInARow = 8,
    allow_failures: Annotated[int, typer.Option(min=0, help="So many prompts may fail: they are left out.")] = 0,
    as_json: bool = typer.Option(False, "--json", help="The whole result as JSON."),
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Win rate of one model over another, with its interval, and if both wrote at equal length.

    Best-of-N stands behind the URL of a proxy: http://127.0.0.1:8000/v1#my-model@8.

    Example: winnow eval compare --a runs/ppo/policy --b runs/sft/policy --prompts held-out.jsonl --seed 1
    """
    try:
        import training.winrate  # noqa: F401 - what it needs is known before anything is drawn
    except ModuleNotFoundError as error:
        raise CommandError(f"this needs {error.name}: install winnow[training]") from error
    defaults = Origin(device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    first = contestant(a, "--a", defaults, a_key_variable)
    second = contestant(b, "--b", defaults, b_key_variable)
    pace = Pace(at_once, per_minute, max_retries, max_wait_s, timeout_s)
    sampling = drawing.sampling_of(count, temperature, top_p, max_tokens, stop, seed, None)
    drawn = Drawing(sampling, pace, max_failures_in_a_row, keep)
    # With the same seeds one model's completions would be tied to the other's: independent draws are what is compared.
    apart = replace(drawn, sampling=replace(sampling, seed=None if seed is None else seed + 1))
    try:
        tasks = _tasks(prompts, first, second)
        judged = None if judgements is None else _judgements(judgements)
        told = [completions_by_key(first, tasks, drawn), completions_by_key(second, tasks, apart)]
        sides = _sides(tasks, told, allow_failures)
        names = (a, b) if a != b else (f"{a} (a)", f"{b} (b)")
        if judged is None:
            judge = load_model(reward_model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
            found, records = _by_reward(names, judge, sides)
        else:
            found, records = _by_people(names, judged, sides)
        if output is not None:
            write_records(output, records)
    except (DataError, OSError) as error:
        raise CommandError(str(error)) from error
    _show(found, as_json)
    if require_better and not found.better:
        raise CommandError(f"--require-better: {found.verdict}", FAILED)


def _tasks(prompts: Files, first: Contestant, second: Contestant) -> list[Task]:
    """Raises `CommandError`, `DataError`."""
    recorded = next((one.recorded for one in (first, second) if one.recorded is not None), None)
    if not prompts and recorded is None:
        raise CommandError("--prompts: is needed, unless --a or --b is a file of completions")
    tasks = read_tasks(prompts) if prompts else recorded_prompts(recorded or Path())
    if not tasks:
        raise CommandError("--prompts: no prompt in the files")
    return tasks


def _judgements(files: Sequence[Path]) -> list[tuple[str, Preference | Ranking]]:
    """By key of the prompt. Raises `DataError`."""

    def parse(record: Mapping[str, Any]) -> Preference | Ranking:
        return parse_ranking(record) if "ranks" in record else parse_preference(record)

    return [(prompt_key(one.prompt), one) for _, one in located_records(files, parse)]


def _sides(tasks: Sequence[Task], told: Sequence[Mapping[str, Any]], allow_failures: int) -> list[_Met]:
    """The completions of both for each prompt. Raises `CommandError` where too many prompts failed."""
    from training.winrate import Sides

    first, second = told
    both = [
        (task, Sides(task.prompt.prompt, first[task.key], second[task.key]))
        for task in tasks
        if task.key in first and task.key in second
    ]
    failed = len(tasks) - len(both)
    if failed > allow_failures:
        raise CommandError(f"{failed} of {len(tasks)} prompts failed: see above, or --allow-failures", FAILED)
    return both


def _by_reward(
    names: tuple[str, str], judge: RewardModel, met: Sequence[_Met]
) -> tuple[Comparison, Iterator[dict[str, Any]]]:
    from training.winrate import compare_models, meetings_by_reward

    sides = [side for _, side in met]
    scored = scored_records(judge, [Completions(one.prompt, one.completions) for one in sides], None)
    rewards = [one["rewards"] for one in scored]
    meetings = meetings_by_reward(sides, rewards)
    try:
        found = compare_models(names, judge.manifest.name, meetings, _lengths(met))
    except ValueError as error:
        raise CommandError(f"--prompts: {error}") from error
    records = _records(names, met, meetings)
    return found, (one | {"rewards": own} for one, own in zip(records, rewards, strict=True))


def _by_people(
    names: tuple[str, str], judged: Sequence[tuple[str, Preference | Ranking]], met: Sequence[_Met]
) -> tuple[Comparison, Iterator[dict[str, Any]]]:
    from training.winrate import compare_models, meetings_by_people

    # A prompt that stands there twice is one prompt to whoever judged its completions.
    once = {prompt_key(side.prompt): (task, side) for task, side in met}
    meetings, unused = meetings_by_people({key: side for key, (_, side) in once.items()}, judged)
    if unused:
        say(f"{unused} judgements are not of these two models' completions")
    try:
        found = compare_models(names, "people", meetings, _lengths(list(once.values())))
    except ValueError as error:
        raise CommandError(f"--judgements: {error}") from error
    return found, _records(names, list(once.values()), meetings)


def _lengths(met: Sequence[_Met]) -> tuple[float, float]:
    from training.winrate import mean_length

    first = mean_length([one for _, side in met for one in side.first])
    return first, mean_length([one for _, side in met for one in side.second])


def _records(names: tuple[str, str], met: Sequence[_Met], meetings: Sequence[Meeting]) -> Iterator[dict[str, Any]]:
    """A prompt a record: all completions, whose they are, and the first model's share of the meetings it won."""
    scores: dict[int, list[float]] = {}
    for one in meetings:
        scores.setdefault(one.prompt, []).append(one.score)
    for number, (task, side) in enumerate(met):
        own = scores.get(number)
        identity = {"id": task.prompt.id, "source": task.prompt.source}
        yield {
            **{name: value for name, value in identity.items() if value is not None},
            "prompt": list(side.prompt),
            "completions": [list(one) for one in side.completions],
            "systems": [names[0]] * len(side.first) + [names[1]] * len(side.second),
            "score": None if own is None else sum(own) / len(own),
        }


def _show(found: Comparison, as_json: bool) -> None:
    if as_json:
        from training.winrate import as_json as plain

        print_json(plain(found))
        return
    first, second = found.models
    controlled = found.length_controlled
    rows: list[list[object]] = [
        ["as they are", *_cells(found.win_rate), found.wins, found.ties, found.losses, p(found.p_value)],
        ["at equal length", *_cells(controlled.win_rate), None, None, None, None],
    ]
    console = out()
    # Names may be long: in a table's title they would be broken.
    judged = f"{first} against {second}, judged by {found.judge}, {found.prompts} prompts:"
    console.print(judged, markup=False, soft_wrap=True)
    console.print(table(["", "win rate", "95 % interval", "wins", "ties", "losses", "p"], rows))
    if (gap := found.reward_gap) is not None:
        console.print(f"Reward: {gap.value:+.3f} ({gap.low:+.3f} – {gap.high:+.3f}) on the mean.", markup=False)
    mine, theirs = found.mean_lengths
    console.print(f"Characters: {mine:.0f} and {theirs:.0f} on the mean.", markup=False)
    if controlled.extrapolates:
        console.print("One model writes more throughout: the figure at equal length is a guess.", markup=False)
    console.print(f"Verdict: {found.verdict}.", markup=False, soft_wrap=True)


def _cells(share: Share) -> tuple[str, str]:
    return f"{share.value:.1%}", f"{share.low:.1%} – {share.high:.1%}"
