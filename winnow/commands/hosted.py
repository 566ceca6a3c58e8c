"""`winnow hosted …`: fine-tuning where the weights are somebody else's. Prepared, created, followed, cancelled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from feedback.jsonl import DataError, replacing
from training.hosted.jobs import create_job, followed, job_of
from training.hosted.openai_shape import utc
from training.hosted.options import HostedOptions
from training.hosted.prepare import Prepared, load_prepared, prepare
from training.hosted.providers import ENDED, Event, JobStatus, Provider, ProviderError
from training.hosted.services import SERVICES, connect
from training.hosted.serving import route_yaml
from training.options import OptionsError, load_options
from winnow.console import FAILED, CommandError, out, print_json, progress_console, say, table

if TYPE_CHECKING:
    from rich.progress import TaskID

SHOWN_EVENTS = 20

app = typer.Typer(no_args_is_help=True, help="Fine-tune hosted models through their providers' APIs.")

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="What `winnow hosted prepare` wrote: its `output`.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.command("prepare")
def prepare_files(
    config: Annotated[Path, typer.Option(help="YAML file; see training/configs/ for an example.")],
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one setting; may be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, count and price; write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn demonstrations, or preferences and rankings, into the files that a provider fine-tunes on.

    Everything is checked by the provider's rules first; nothing is sent. A bad record is named by file, line and field.

    Example: winnow hosted prepare --config training/configs/hosted-dpo.yaml --set provider=together --dry-run
    """
    with _telling(), _counted("checking") as advance:
        prepared = prepare(load_options(HostedOptions, config, override or []), dry_run=dry_run, on_record=advance)
    if as_json:
        print_json(_facts(prepared))
        return
    _show_prepared(prepared)
    if prepared.folder is not None:
        say(f"next: winnow hosted create {prepared.folder}")


@app.command()
def create(folder: Folder, as_json: AsJson = False) -> None:
    """Upload the files and create the job.

    Given again after a failure or a kill, it goes on where it was: nothing is uploaded or created twice.

    Example: winnow hosted create runs/tuned
    """
    with _telling():
        prepared = load_prepared(folder)
        options = prepared.options
        _warn(options)
        with connect(options) as provider, progress_console().status("Creating …") as status:
            job = create_job(prepared, provider, say=status.update)
    if as_json:
        print_json({"job": job, "provider": options.provider, "folder": str(folder)})
        return
    out().print(table(["job", "provider", "method", "model"], [[job, options.provider, options.method, options.model]]))
    say(f"next: winnow hosted status {folder} --follow")


@app.command()
def status(
    folder: Folder,
    follow: Annotated[bool, typer.Option("--follow", help="Stay until the job has ended; exit 1 unless well.")] = False,
    route: Annotated[str | None, typer.Option(help="The route's name; the folder's, if not given.")] = None,
    route_file: Annotated[Path | None, typer.Option(help="Write the route to a new YAML file.")] = None,
    as_json: AsJson = False,
) -> None:
    """How the job stands: its state, events, metrics, and the tuned model as a route for the proxy.

    Example: winnow hosted status runs/tuned --follow --route-file tuned.yaml
    """
    with _telling():
        options = load_prepared(folder).options
        job = job_of(folder)
        if route_file is not None and route_file.exists():
            raise OptionsError(f"--route-file {route_file}: is there already: name a new file")
        with connect(options) as provider:
            if follow:
                state, events = _follow(provider, job, options)
            else:
                state, events = provider.status(job), provider.events(job)
            checkpoints = provider.checkpoints(job) if state.stage == "succeeded" else []
            name = route or folder.resolve().name
            snippet = route_yaml(options, provider, state, name) if state.model else None
            note = provider.serving_note
    if as_json:
        record = asdict(state) | {"events": [asdict(event) for event in events], "route": snippet}
        print_json(record | {"checkpoints": [asdict(one) for one in checkpoints]})
    else:
        _show_status(state, [] if follow else events)
        if checkpoints:
            rows = [[one.step, one.model, _metrics(one.metrics)] for one in checkpoints]
            out().print(table(["step", "checkpoint", "metrics"], rows, title="Checkpoints"))
    if state.stage in ("failed", "cancelled") and (follow or route_file is not None):
        raise CommandError(f"job {job} {state.stage}: {state.error or 'the provider gives no reason'}", FAILED)
    _offer(snippet, note, route_file, as_json)


@app.command()
def cancel(folder: Folder) -> None:
    """Ask the provider to stop the job.

    Example: winnow hosted cancel runs/tuned
    """
    with _telling():
        options = load_prepared(folder).options
        job = job_of(folder)
        with connect(options) as provider:
            before = provider.status(job)
            if before.stage in ENDED:
                raise ProviderError(f"job {job} has ended already: {before.stage}")
            provider.cancel(job)
            after = provider.status(job)
    _show_status(after, [])


@contextmanager
def _telling() -> Iterator[None]:
    """What a person can mend is exit 2, what the provider refuses is exit 1, both in one line."""
    try:
        yield
    except (OptionsError, DataError) as error:
        raise CommandError(str(error)) from error
    except ProviderError as error:
        raise CommandError(str(error), FAILED) from error
    except OSError as error:
        raise CommandError(str(error), FAILED) from error


@contextmanager
def _counted(what: str) -> Iterator[Callable[[], None]]:
    """A count that moves on a terminal."""
    console = progress_console()
    columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed:.0f} records"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda: progress.advance(task)


def _warn(options: HostedOptions) -> None:
    notice = SERVICES[options.provider].notice
    if notice is not None:
        say(f"note: {notice}", style="yellow")


def _facts(prepared: Prepared) -> dict[str, Any]:
    return {
        "run": prepared.run,
        "folder": None if prepared.folder is None else str(prepared.folder),
        "train": asdict(prepared.train),
        "validation": None if prepared.validation is None else asdict(prepared.validation),
        "passes": prepared.passes,
        "dollars": prepared.dollars,
        "tokens_are_estimated": prepared.options.tokenizer is None,
    }


def _show_prepared(prepared: Prepared) -> None:
    options = prepared.options
    splits = [("train", prepared.train)] + ([("validation", prepared.validation)] if prepared.validation else [])
    rows = [
        [
            name,
            facts.num_records,
            facts.num_rows,
            facts.num_tied,
            facts.num_contradictions,
            facts.num_skipped,
            facts.tokens,
            facts.longest_tokens,
            f"{facts.size_bytes / 1e6:.2f} MB",
        ]
        for name, facts in splits
    ]
    columns = ["file", "records", "rows", "ties left out", "contradictions", "skipped", "tokens", "longest", "size"]
    console = out()
    console.print(table(columns, rows, title=f"{options.method} for {options.model} at {options.provider}"))
    how = (
        f"counted with {options.tokenizer}"
        if options.tokenizer
        else (f"estimated at {options.bytes_per_token:g} bytes a token")
    )
    console.print(f"tokens are {how}; of a pair both conversations count", markup=False)
    if prepared.dollars is not None:
        passes = "one pass" if prepared.passes == 1 else f"{prepared.passes} passes"
        passes += "" if options.epochs else " (the provider may make more)"
        console.print(f"about {prepared.dollars:.2f} dollars for {passes}", markup=False)
    for _, facts in splits:
        for problem in facts.skipped:
            say(f"skipped: {problem}")


def _follow(provider: Provider, job: str, options: HostedOptions) -> tuple[JobStatus, list[Event]]:
    """Events as they come, above a bar. The last status, and all events."""
    console = progress_console()
    every: list[Event] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(job, total=None)
        for state, events in followed(provider, job, options.poll_s, max_tries=options.max_tries):
            every.extend(events)
            for event in events:
                progress.console.print(_line(event), markup=False)
            _advance(progress, task, state, every)
    return state, every


def _advance(progress: Progress, task: TaskID, state: JobStatus, events: list[Event]) -> None:
    progress.update(task, description=f"{state.id} {state.stage}")
    steps = [event.metrics for event in events if {"step", "total_steps"} <= event.metrics.keys()]
    if state.progress is not None:
        progress.update(task, completed=state.progress, total=1.0)
    elif steps and steps[-1]["total_steps"] > 0:
        progress.update(task, completed=steps[-1]["step"], total=steps[-1]["total_steps"])


def _line(event: Event) -> str:
    level = "" if event.level == "info" else f"{event.level}: "
    metrics = _metrics(event.metrics)
    return f"{event.at}  {level}{event.message}" + (f"  ({metrics})" if metrics else "")


def _metrics(metrics: Any) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in metrics.items())


def _show_status(state: JobStatus, events: list[Event]) -> None:
    console = out()
    end = None if state.finishes_at is None else utc(state.finishes_at)
    row = [state.id, state.stage, state.said, end, state.model, state.trained_tokens, state.error]
    console.print(table(["job", "stage", "provider says", "ends (UTC)", "tuned model", "tokens", "error"], [row]))
    if events:
        shown = [[event.at, event.level, event.message, _metrics(event.metrics)] for event in events[-SHOWN_EVENTS:]]
        console.print(table(["UTC", "level", "event", "metrics"], shown, title=f"Last {len(shown)} events"))


def _offer(snippet: str | None, note: str | None, route_file: Path | None, as_json: bool) -> None:
    """The tuned model as a route."""
    if snippet is None:
        if route_file is not None:
            raise CommandError(f"--route-file {route_file}: there is no tuned model yet, so no route", FAILED)
        return
    if route_file is not None:
        with replacing(route_file) as partial:
            partial.write_text(snippet, encoding="utf-8")
        say(f"route in {route_file}: winnow serve --config {route_file}")
    elif not as_json:
        out().print(f"\nFor `winnow serve --config FILE`:\n\n{snippet}", markup=False)
    if note is not None:
        say(note)
