"""`winnow sample`: K completions a prompt, ready for people or a reward model to rank."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from feedback.jsonl import DataError, Skipped
from feedback.rankings import ranks_of
from feedback.records import parse_completions
from reward.rendering import content_text
from training.sampling import Draft, Outcome, read_tasks
from winnow.commands import drawing
from winnow.commands.models import Device, Dtype, SkipInvalid, TrustRemoteCode, load_model
from winnow.commands.score import SHOWN_CHARACTERS, scored_records
from winnow.console import FAILED, CommandError, out, say, table
from winnow.generation import KEY_VARIABLE, Origin, Pace

if TYPE_CHECKING:
    from reward.model import RewardModel

_SCORED_AT_ONCE = 512
"""Prompts: bounds what is held in memory while rewards are computed."""
_JUDGED = (
    "rewards", "raw_rewards", "percentiles", "truncated", "stds", "objectives", "reward_model", "ranks",
)  # fmt: skip
"""Members that a reward model gives a record."""


def sample(
    prompts: Annotated[list[Path], typer.Option(help="File of records with a `prompt`; may be repeated.")],
    count: Annotated[int, typer.Option("-k", "--count", min=1, help="Completions a prompt.")] = 4,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write records to this file; the way to go on after a kill.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible base URL. Without: a model in this process.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The server's model; the first that it lists, if not given.")
    ] = None,
    local_model: Annotated[
        str | None, typer.Option(help="Folder, hub id or package:NAME; the embedded one, if not given.")
    ] = None,
    key_variable: Annotated[str, typer.Option(help="Environment variable with the server's key.")] = KEY_VARIABLE,
    temperature: drawing.Temperature = None,
    top_p: drawing.TopP = None,
    max_tokens: drawing.MaxTokens = None,
    stop: drawing.Stop = None,
    seed: drawing.Seed = None,
    body: drawing.Body = None,
    reward_model: Annotated[
        str | None, typer.Option(help="Score what was drawn: folder, hub id, or `default`. Adds `rewards`.")
    ] = None,
    ranks: bool = typer.Option(False, "--ranks", help="Add `ranks` by these rewards: a record to train on."),
    at_once: drawing.AtOnce = 8,
    per_minute: drawing.PerMinute = None,
    max_retries: drawing.MaxRetries = 6,
    max_wait_s: drawing.MaxWait = 300.0,
    timeout_s: drawing.Timeout = 600.0,
    max_failures_in_a_row: drawing.MaxFailuresInARow = 8,
    allow_failures: Annotated[
        int, typer.Option(min=0, help="So many prompts may fail: the output is then written without them.")
    ] = 0,
    as_json: bool = typer.Option(False, "--json", help="Records as JSON lines on standard output."),
    skip_invalid: SkipInvalid = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """K completions a prompt from any server or local model, ready to rank.

    What came is kept in OUT.partial: given again after a kill, the same command asks only for what is missing.

    Example: winnow sample --prompts prompts.jsonl -k 4 --base-url https://host/v1 --model my-model -o samples.jsonl
    """
    if base_url is None and model is not None:
        raise CommandError("--model names a server's model and needs --base-url; a local one is named by --local-model")
    if base_url is not None and local_model is not None:
        raise CommandError("--base-url and --local-model: completions come from one of them")
    if ranks and (reward_model is None or count < 2):
        raise CommandError("--ranks: needs --reward-model, and two completions or more to rank")
    sampling = drawing.sampling_of(count, temperature, top_p, max_tokens, stop, seed, body)
    origin = Origin(base_url, model or local_model, key_variable, device, dtype, trust_remote_code)
    pace = Pace(at_once, per_minute, max_retries, max_wait_s, timeout_s)
    skipped = Skipped()
    try:
        tasks = read_tasks(prompts, skipped if skip_invalid else None)
        if not tasks:
            raise CommandError(f"--prompts: no prompt in {', '.join(map(str, prompts))}")
        if skipped.count:
            say(f"skipped {skipped.count} bad records, such as {skipped.examples[0]}")
        with tempfile.TemporaryDirectory() as passing:
            target = output or Path(passing) / "samples.jsonl"
            with Draft(target, tasks, sampling) as draft:
                outcome = drawing.draw(
                    origin, sampling, pace, draft.begin, draft.keep, max_failures_in_a_row=max_failures_in_a_row
                )
                _report(outcome, len(tasks), allow_failures, None if output is None else draft.path)
                judge = _judge(reward_model, device, dtype, trust_remote_code)
                if draft.output_was_whole and judge is None:
                    draft.discard()
                else:
                    draft.finish(_judged(draft.records(), judge, ranks))
            if output is None:
                _show(target, as_json)
            else:
                say(f"{len(tasks) - len(outcome.failures)} records in {output}")
    except (DataError, OSError) as error:
        raise CommandError(str(error)) from error


def _report(outcome: Outcome, num_prompts: int, allowed: int, kept: Path | None) -> None:
    """Says which prompts have no completions. Raises `CommandError` where they are more than is allowed."""
    drawing.show_failures(outcome)
    if len(outcome.failures) <= allowed and not outcome.not_asked:
        return
    not_asked = f" and {outcome.not_asked} were not asked" if outcome.not_asked else ""
    way_out = "" if kept is None else f"; the others are in {kept}, and the same command asks only for what is missing"
    raise CommandError(f"{len(outcome.failures)} of {num_prompts} prompts failed{not_asked}{way_out}", FAILED)


def _judge(name: str | None, device: str, dtype: str, trust_remote_code: bool) -> RewardModel | None:
    """Loaded only when the model that was sampled is gone from memory."""
    if name is None:
        return None
    return load_model(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code)


def _judged(records: Iterator[dict[str, Any]], judge: RewardModel | None, ranks: bool) -> Iterator[dict[str, Any]]:
    """The records with what the judge says, and nothing that another model said before. People's ranks stay."""
    while chunk := list(islice(records, _SCORED_AT_ONCE)):
        plain = [_unjudged(one) for one in chunk]
        if judge is None:
            yield from plain
            continue
        scored = scored_records(judge, [parse_completions(one) for one in plain], None)
        for one, found in zip(plain, scored, strict=True):
            one |= {name: found[name] for name in _JUDGED if name in found}
            yield {"ranks": ranks_of(found["rewards"])} | one if ranks else one


def _unjudged(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in record.items() if name not in _JUDGED}
    rewards, ranks = record.get("rewards"), record.get("ranks")
    if ranks is not None and (rewards is None or ranks != ranks_of(rewards)):
        kept["ranks"] = ranks
    return kept


def _show(path: Path, as_json: bool) -> None:
    """On standard output, where no file was named."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if as_json:
        for line in lines:
            print(line)  # noqa: T201
        return
    rows = []
    for number, record in enumerate(map(json.loads, lines), start=1):
        rewards = record.get("rewards") or [None] * len(record["completions"])
        for index, completion in enumerate(record["completions"]):
            text = " ".join(" ".join(content_text(message) for message in completion).split())
            shown = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
            rows.append([number, index, record["finish_reasons"][index], rewards[index], shown])
    out().print(table(["prompt", "#", "finish", "reward", "completion"], rows))
