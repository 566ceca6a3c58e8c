"""Checkpoints that a killed run goes on from, exactly.

Weights, optimizer, schedule, the loss scale of fp16, random state, best so far.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from training.distributed import gathered, scattered_optimizer_state
from training.options import OptionsError

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


class Trainable(Protocol):
    """What training changes."""

    def trainable_state(self) -> dict[str, Tensor]: ...

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None: ...


def best_file(run: Path) -> Path:
    """Where `keep_best` puts weights."""
    return run / "checkpoints" / "best.pt"


def keep_best(accelerator: Accelerator, model: Trainable, run: Path) -> None:
    """Keeps the weights as they are now; all processes take part."""
    weights = gathered(model.trainable_state(), keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        target = best_file(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            torch.save(weights, file)
        Path(file.name).replace(target)


def save_training(
    accelerator: Accelerator, model: Trainable, optimizer: Any, schedule: Any, step: int, best: list[float], run: Path
) -> None:
    """A checkpoint of a run of gradient steps; all processes take part. `best`: numbers that are given back."""
    states = gather_object([random_state()])
    state = {
        "weights": gathered(model.trainable_state(), keep=accelerator.is_main_process),
        "optimizer": gathered(optimizer.state_dict(), keep=accelerator.is_main_process),
        "schedule": schedule.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "random": states,
        "best": best,
    }
    if accelerator.is_main_process:
        save_checkpoint(run / "checkpoints", step, state)
    accelerator.wait_for_everyone()


def resume_training(
    accelerator: Accelerator, model: Trainable, optimizer: Any, schedule: Any, run: Path
) -> tuple[int, list[Any]] | None:
    """Puts back the newest checkpoint: its step and `best`. None where there is none.

    Raises `OptionsError` where processes see different checkpoints, or are not as many as they were.
    """
    state = load_checkpoint(run / "checkpoints")
    # All processes must take the same one, also when the newest appeared between two looks.
    (step,) = broadcast_object_list([state["step"] if state else 0])
    if step == 0:
        return None
    if state is None or state["step"] != step:
        raise OptionsError(f"output: process {accelerator.process_index} does not see step {step} in {run}")
    if len(state["random"]) != accelerator.num_processes:
        raise OptionsError(
            f"output: {run} was trained with {len(state['random'])} processes; go on with as many, or start anew"
        )
    model.load_trainable_state(state["weights"])
    optimizer.load_state_dict(scattered_optimizer_state(optimizer, state["optimizer"]))
    schedule.load_state_dict(state["schedule"])
    if accelerator.scaler is not None and state.get("scaler") is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    restore_random_state(state["random"][accelerator.process_index])
    return step, state["best"]
