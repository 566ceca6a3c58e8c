"""Checkpoints that a killed run goes on from, exactly: weights, optimizer, schedule, random state, best so far."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

PREFIX = "step-"
KEPT = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Writes `folder/step-NNNNNN`, whole or not at all, and drops all but the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{PREFIX}{step:07d}"
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        torch.save({"step": step, **state}, partial / "state.pt")
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in _all(folder)[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint, or None. Tensors come on the CPU."""
    found = _all(folder)
    if not found:
        return None
    # weights_only: a checkpoint can hold tensors, numbers and containers, never code.
    state: dict[str, Any] = torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True)
    return state


def random_state() -> dict[str, Any]:
    """Of Python's and torch's generators in this process."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{PREFIX}*")) if folder.is_dir() else []
