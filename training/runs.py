"""Run folders: whose run a folder holds, said before the first step, so that no other one goes on with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feedback.jsonl import replacing
from training.options import OptionsError, StepOptions

OPTIONS_NAME = "options.json"


def described(options: StepOptions, files: Sequence[str]) -> dict[str, Any]:
    """The options and what the data files hold: a run must not go on with other data under the same names."""
    digests = {file: file_digest(file) for file in files if Path(file).expanduser().is_file()}
    return {**options.model_dump(mode="json"), "data": digests}


def refuse_taken(run: Path, description: dict[str, Any], result: str) -> None:
    """Raises `OptionsError` for a folder that holds a finished run, known by `result`, or one described otherwise."""
    if (run / result).exists():
        raise OptionsError(f"output: {run} holds a finished run; choose another folder, or delete it")
    path = run / OPTIONS_NAME
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in description.keys() | before.keys() if description.get(key) != before.get(key))
        if changed:
            raise OptionsError(
                f"output: {run} holds a run with another {', '.join(changed)}; choose another folder, or delete it"
            )


def claim(run: Path, description: dict[str, Any]) -> None:
    """Says in the folder whose run it is."""
    with replacing(run / OPTIONS_NAME) as partial:
        partial.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def file_digest(file: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(file).expanduser().open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
