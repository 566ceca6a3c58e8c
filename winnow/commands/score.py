"""`winnow score`: rewards for recorded completions."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from feedback.jsonl import DataError, Skipped, read_records, write_records
from feedback.records import Completions, parse_completions
from reward.errors import RewardError
from reward.rendering import content_text
from winnow.commands.models import (
    Device,
    Dtype,
    MaxBatchTokens,
    ModelSource,
    SkipInvalid,
    TrustRemoteCode,
    load_model,
    score_with_progress,
)
from winnow.console import CommandError, out, say, table

if TYPE_CHECKING:
    from reward.model import RewardModel
    from reward.scorer import Score

SHOWN_CHARACTERS = 80


def score(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[IN]", help="Records with prompt and completion or completions; else standard input."),
    ] = None,
    reward_model: ModelSource = "default",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write scored records to this file.")] = None,
    as_json: bool = typer.Option(False, "--json", help="Scored records as JSON lines on standard output."),
    skip_invalid: SkipInvalid = False,
    max_batch_tokens: MaxBatchTokens = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score completions: one reward each, and the percentile among the model's reference completions.

    Example: winnow score --reward-model default records.jsonl -o scored.jsonl
    """
    skipped = Skipped()
    try:
        with _input(file) as path:
            records = list(read_records([path], parse_completions, skipped if skip_invalid else None))
    except DataError as error:
        raise CommandError(str(error)) from error
    model = load_model(reward_model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    scored = scored_records(model, records, max_batch_tokens)
    if skipped.count:
        say(f"skipped {skipped.count} bad records, such as {skipped.examples[0]}")
    if output is not None:
        try:
            count = write_records(output, scored)
        except (DataError, OSError) as error:
            raise CommandError(f"-o {output}: {error}") from error
        say(f"{count} records in {output}")
    elif as_json:
        for record in scored:
            print(json.dumps(record, ensure_ascii=False))  # noqa: T201
    else:
        _show(records, scored)


@contextmanager
def _input(file: Path | None) -> Iterator[Path]:
    """The file, or a copy of standard input under a name that error messages can show."""
    if file is not None:
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stdin"
        path.write_bytes(sys.stdin.buffer.read())
        yield path


def scored_records(
    model: RewardModel, records: Sequence[Completions], max_batch_tokens: int | None
) -> list[dict[str, Any]]:
    """Records of the kind `scored`, each completion with its reward. Raises `CommandError`."""
    try:
        items = [
            item
            for record in records
            for item in model.shared([model.renderer.render(record.prompt, one) for one in record.completions])
        ]
        raw_scores = score_with_progress(model, items, max_batch_tokens)
    except (RewardError, ValueError) as error:
        raise CommandError(str(error)) from error
    every = [model.manifest.score(raw, item) for raw, item in zip(raw_scores, items, strict=True)]
    scored, position = [], 0
    for record in records:
        own = every[position : position + len(record.completions)]
        position += len(own)
        identity = {} if record.id is None else {"id": record.id}
        scored.append(
            {
                **identity,
                "prompt": list(record.prompt),
                "completions": [list(completion) for completion in record.completions],
                "rewards": [score.reward for score in own],
                "raw_rewards": [score.raw_reward for score in own],
                "percentiles": [score.percentile for score in own],
                "truncated": [score.truncated for score in own],
                **_of_heads(own),
                "reward_model": model.manifest.name,
            }
        )
    return scored


def _of_heads(scores: Sequence[Score]) -> dict[str, Any]:
    """Lists of what several heads say besides, where there are such."""
    found: dict[str, Any] = {}
    if scores[0].std is not None:
        found["stds"] = [score.std for score in scores]
    if scores[0].objectives is not None:
        names = scores[0].objectives
        found["objectives"] = {name: [(score.objectives or {})[name] for score in scores] for name in names}
    return found


def _show(records: Sequence[Completions], scored: list[dict[str, Any]]) -> None:
    has_std = bool(scored) and "stds" in scored[0]
    objectives: list[str] = list(scored[0].get("objectives", ())) if scored else []
    rows = []
    for number, (record, scores) in enumerate(zip(records, scored, strict=True), start=1):
        best = max(scores["rewards"])
        for index, completion in enumerate(record.completions):
            text = " ".join(" ".join(content_text(message) for message in completion).split())
            rows.append(
                [
                    number,
                    index,
                    "★" if scores["rewards"][index] == best and len(record.completions) > 1 else "",
                    scores["rewards"][index],
                    scores["percentiles"][index],
                    *([scores["stds"][index]] if has_std else []),
                    *(scores["objectives"][name][index] for name in objectives),
                    text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…",
                ]
            )
    more = [*(["std"] if has_std else []), *objectives]
    out().print(table(["record", "#", "", "reward", "percentile", *more, "completion"], rows))
