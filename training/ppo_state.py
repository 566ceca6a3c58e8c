"""Checkpoints of PPO: all that a killed run needs to go on exactly.

Both networks, both optimizers, the averaged weights, β, how far the prompts and the language data were read. Every
draw and every order is a function of the seed and of these counters; torch's own generators are kept beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from training.checkpoints import load_checkpoint, random_state, restore_random_state, save_checkpoint
from training.distributed import gathered
from training.kl import AdaptiveKL
from training.options import OptionsError
from training.policies import put_weights
from training.ppo_parts import PpoParts

if TYPE_CHECKING:
    from training.ppo import Progress

FOLDER = "checkpoints"


def save_progress(accelerator: Accelerator, parts: PpoParts, progress: Progress, run: Path) -> None:
    """Writes a checkpoint; every process takes part."""
    state: dict[str, Any] = {
        "policy": parts.writer.weights(),
        "value": gathered(dict(parts.actors.value.named_parameters()), keep=accelerator.is_main_process),
        "optimizers": parts.learner.state(),
        "kl_coef": progress.controller.coefficient,
        "average": progress.average.weights if progress.average is not None else {},
        "mix_taken": parts.mix.taken if parts.mix is not None else 0,
        "stopped": progress.stopped,
        "best": [progress.best_reward, progress.stale],
        "random": gather_object([random_state()]),
    }
    if accelerator.is_main_process:
        save_checkpoint(run / FOLDER, progress.iteration, state)
    accelerator.wait_for_everyone()


def load_progress(accelerator: Accelerator, parts: PpoParts, progress: Progress, run: Path) -> None:
    """Puts the newest checkpoint's state back, where there is one.

    Raises `OptionsError` when the processes are not as many as they were, or do not see the same folder.
    """
    state = load_checkpoint(run / FOLDER)
    # All processes must take the same one, also when the newest appeared between two looks.
    (step,) = broadcast_object_list([state["step"] if state else 0])
    if step == 0:
        return
    if state is None or state["step"] != step:
        raise OptionsError(f"output: process {accelerator.process_index} does not see step {step} in {run}")
    if len(state["random"]) != accelerator.num_processes:
        raise OptionsError(
            f"output: {run} was trained with {len(state['random'])} processes; go on with as many, or start anew"
        )
    parts.actors.policy.load_trainable_state(state["policy"])
    put_weights(parts.actors.value, state["value"])
    parts.learner.load_state(state["optimizers"])
    if isinstance(progress.controller, AdaptiveKL):
        progress.controller = AdaptiveKL(state["kl_coef"], progress.controller.target, progress.controller.horizon)
    if progress.average is not None and accelerator.is_main_process:
        progress.average.weights.update(state["average"])
    if parts.mix is not None:
        parts.mix.taken = state["mix_taken"]
    progress.iteration, progress.stopped = step, state["stopped"]
    progress.best_reward, progress.stale = state["best"]
    restore_random_state(state["random"][accelerator.process_index])
