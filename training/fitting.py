"""A run of gradient steps on a policy: validation, the best weights kept, early stopping, checkpoints, exact resume.

What is learnt in a step is the method's, as an `Objective`. All that chance decides is a function of the seed, the step
and the restored random state, so that a killed run goes on as if nothing had happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from training.batches import step_batches, steps_in_epoch
from training.checkpoints import best_file, keep_best, resume_training, save_training
from training.distributed import Placement, gathered, place
from training.loop import build_optimizer, build_schedule
from training.options import OptionsError, PolicyOptions
from training.policies import Policy, load_policy_for, save_policy
from training.runlog import RunLog, Sample

RESULT = "policy"
"""The finished policy, in the run folder."""

DECIDING = "validation_loss"
"""The metric by which validations are compared; less is better."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What a method does with its data."""

    num_examples: int
    learn: Callable[[Placement, Sequence[int]], dict[str, float]]
    """Backward passes over these examples, shared out over the processes; the step's metrics, the same in all."""
    validate: Callable[[Placement], dict[str, float]] | None = None
    """Metrics on held-out data, `DECIDING` among them; None without such data."""
    sample: Callable[[Placement], list[Sample]] | None = None
    """Texts to look at after a validation."""
    prepare: Callable[[Placement], None] | None = None
    """Called once, with the model in its place and its weights still those it was loaded with."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A finished run of steps."""

    steps: int
    best_step: int
    weights: dict[str, Tensor]
    """The best weights, as `Policy.trainable_state` names them, whole and on the CPU."""


@dataclass(slots=True)
class _Progress:
    step: int = 0
    best: float = math.inf
    best_step: int = 0
    stale: int = 0
    """Validations since the best one."""


def fit_policy(
    accelerator: Accelerator, policy: Policy, objective: Objective, options: PolicyOptions, run: Path
) -> Path:
    """Fits the policy and saves what is best of it; returns its folder. Raises as `fit` does."""
    fitted = fit(accelerator, policy, objective, options, run)
    if accelerator.is_main_process:
        # One process cannot put shards together: the base is loaded again, whole.
        whole = load_policy_for(options) if options.sharding != "none" else policy
        whole.load_trainable_state(fitted.weights)
        save_policy(whole, run / RESULT, merge=options.merge_adapter)
    accelerator.wait_for_everyone()
    return run / RESULT


def fit(accelerator: Accelerator, policy: Policy, objective: Objective, options: PolicyOptions, run: Path) -> Fitted:
    """Takes the steps that `options` ask for, or those that are left of a run that was killed.

    Raises `OptionsError` when the loss is no number any more, or the folder holds a run of other processes.
    """
    num_steps = max(1, round(options.epochs * steps_in_epoch(objective.num_examples, options.global_batch_size)))
    placement = place(accelerator, policy.model, options.sharding)
    if objective.prepare is not None:
        objective.prepare(placement)
    optimizer = accelerator.prepare(build_optimizer(policy.model, options))
    schedule = build_schedule(optimizer, num_steps, options)
    # From here on chance is each process's own: dropout must not hide the same units on all of them.
    set_seed(options.seed, device_specific=True)
    progress = _resume(accelerator, policy, optimizer, schedule, run)
    order = step_batches(objective.num_examples, options.global_batch_size, options.seed, num_steps)
    stopping = _is_stale(progress, options)
    with RunLog(run, active=accelerator.is_main_process, resumed_step=progress.step) as log:
        bar = log.task("training", total=num_steps, completed=progress.step)
        if objective.validate is not None and progress.step == 0:
            # What training starts from, to hold all that follows against. It is no candidate for the best weights.
            policy.model.eval()
            log.metrics(0, objective.validate(placement))
        for indices in islice(order, progress.step, None):
            if stopping:
                break
            metrics = _step(placement, optimizer, schedule, objective, indices, options)
            progress.step += 1
            _require_number(metrics["loss"], progress.step, options)
            log.metrics(progress.step, metrics)
            bar.advance(note=f"loss {metrics['loss']:.3f}")
            is_end = progress.step == num_steps
            if objective.validate is not None and (progress.step % options.eval_every == 0 or is_end):
                policy.model.eval()
                found = objective.validate(placement)
                _require_number(found[DECIDING], progress.step, options)
                log.metrics(progress.step, found)
                if objective.sample is not None:
                    log.samples(progress.step, objective.sample(placement))
                _remember_best(accelerator, policy, progress, found[DECIDING], run)
            stopping = _is_stale(progress, options)
            if progress.step % options.save_every == 0 or is_end or stopping:
                _save(accelerator, policy, optimizer, schedule, progress, run)
        if stopping:
            log.note(f"stopped early: no better {DECIDING} in {progress.stale} validations")
    if objective.validate is None:
        return Fitted(progress.step, progress.step, gathered(policy.trainable_state()))
    accelerator.wait_for_everyone()
    best = torch.load(best_file(run), map_location="cpu", weights_only=True)
    return Fitted(progress.step, progress.best_step, best)


def _step(
    placement: Placement,
    optimizer: Any,
    schedule: Any,
    objective: Objective,
    indices: Sequence[int],
    options: PolicyOptions,
) -> dict[str, float]:
    """One optimizer update on these examples, over all processes. Returns the step's metrics."""
    placement.network.train()
    metrics = objective.learn(placement, indices)
    norm: Any = placement.accelerator.clip_grad_norm_(placement.network.parameters(), options.max_grad_norm)
    learning_rate = schedule.get_last_lr()[0]
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return {**metrics, "grad_norm": float(gathered(norm)), "learning_rate": learning_rate}


def _require_number(loss: float, step: int, options: PolicyOptions) -> None:
    if not math.isfinite(loss):
        raise OptionsError(
            f"learning_rate: the loss of step {step} is {loss}; the run cannot recover. Try less than "
            f"{options.learning_rate:g}, or a longer warm-up (warmup_share), in another output folder"
        )


def _is_stale(progress: _Progress, options: PolicyOptions) -> bool:
    return options.patience is not None and progress.stale >= options.patience


def _remember_best(accelerator: Accelerator, policy: Policy, progress: _Progress, loss: float, run: Path) -> None:
    if loss >= progress.best:
        progress.stale += 1
        return
    progress.best, progress.best_step, progress.stale = loss, progress.step, 0
    keep_best(accelerator, policy, run)


def _save(
    accelerator: Accelerator, policy: Policy, optimizer: Any, schedule: Any, progress: _Progress, run: Path
) -> None:
    best = [progress.best, progress.best_step, progress.stale]
    save_training(accelerator, policy, optimizer, schedule, progress.step, best, run)


def _resume(accelerator: Accelerator, policy: Policy, optimizer: Any, schedule: Any, run: Path) -> _Progress:
    found = resume_training(accelerator, policy, optimizer, schedule, run)
    if found is None:
        return _Progress()
    step, (best, best_step, stale) = found
    return _Progress(step, best, best_step, stale)
