"""`job.json`: what was sent to a provider and created there, and what was about to be."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from feedback.jsonl import replacing
from training.options import OptionsError

RECORD_FILE = "job.json"
State = Literal["absent", "asked", "done"]


@dataclass(frozen=True, slots=True)
class Made:
    """Something that was made at the provider, or is being made."""

    state: State = "absent"
    id: str | None = None


@dataclass(frozen=True, slots=True)
class JobRecord:
    """`job.json`: how far a folder has come."""

    run: str
    train: Made = Made()
    validation: Made = Made()
    job: Made = Made()

    @classmethod
    def load(cls, folder: Path) -> JobRecord | None:
        """None where nothing was sent yet. Raises `OptionsError` for a record that cannot be read."""
        file = folder / RECORD_FILE
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            made = {name: Made(**record[name]) for name in ("train", "validation", "job")}
            return cls(run=str(record["run"]), **made)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OptionsError(f"{file}: cannot be read ({error}); it says what was sent: mend it by hand") from error

    def save(self, folder: Path) -> None:
        with replacing(folder / RECORD_FILE) as partial:
            partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
