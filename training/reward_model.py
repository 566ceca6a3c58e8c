"""Reward model training on human rankings.

InstructGPT (Ouyang et al., arXiv 2203.02155), section 3.5: a pretrained model with a scalar head learns

    loss(θ) = −1/C(K,2) · E[ log σ(r_θ(x, y_w) − r_θ(x, y_l)) ]                                    (eq. 1)

over all comparisons of the K completions of a prompt, kept together as one batch element and each completion
encoded once. Departures:

1. Preferences of one prompt are gathered with its rankings; ties carry no loss.
2. `tuning: head` freezes the base and solves for the head exactly (`frozen`, `heads`): no gradient steps.
3. Rewards are normalised afterwards, to mean 0 and deviation 1 over held-out completions, outside the weights
   (the paper shifts its bias so that demonstrations average 0).
4. Optional: margins in the data (Llama 2), label smoothing, a centring term (`losses.centering_loss`), an expert for
   length that is left out afterwards (`length`).
5. A prompt and its completions are one row where that is exact and cheaper (`packing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from feedback.jsonl import Skipped
from reward.devices import exact_dtype
from reward.network import batches_by_length, collate
from reward.rendering import Rendered
from training.batches import (
    EncodedGroup,
    MicroBatch,
    encode_groups,
    flatten,
    step_batches,
    steps_in_epoch,
)
from training.bootstrap import centre_heads, with_head_weights
from training.checkpoints import best_file, keep_best, resume_training, save_training
from training.comparisons import read_comparisons
from training.distributed import Placement, gathered, place
from training.evaluation import accuracy_of, pair_outcomes
from training.frozen import fit_frozen
from training.heads import domain_indices
from training.length import length_log_odds, without_length
from training.loop import accumulate, build_optimizer, build_schedule, start_accelerator
from training.losses import centering_loss, num_correct, pairwise_ranking_loss
from training.models import TrainableReward, last_token_classifier, load_trainable
from training.objectives import own_rewards, require_sources, rewards_by_own_heads, with_objectives
from training.options import OptionsError, RewardOptions
from training.packing import Packing, Part, choose_packing, split, tensors_of
from training.publish import publish
from training.runlog import RunLog
from training.runs import claim, described, refuse_taken


def train_reward_model(options: RewardOptions) -> Path:
    """Runs (or goes on with) the training that `options` describe; returns the folder of the finished model.

    Raises `OptionsError`, `feedback.jsonl.DataError`, `reward.errors.RewardError`.
    """
    run = Path(options.output)
    description = described(options, [*options.train, *options.validation])
    refuse_taken(run, description, result="model")
    accelerator = start_accelerator(options, frozen=options.tuning == "head")
    set_seed(options.seed)
    skipped = Skipped()
    train = read_comparisons(options.train, options.skip_invalid, skipped)
    validation = read_comparisons(options.validation, options.skip_invalid, skipped)
    if not train:
        raise OptionsError(f"train: no decided comparison in {', '.join(options.train)}")
    domains, _ = domain_indices([group.source for group in train], options.gated)
    trainable = load_trainable(options, tuple(domains))
    if options.objectives:
        require_sources(train, validation, options.objectives)
    encoded = with_head_weights(encode_groups(train, trainable.renderer), options.heads, options.seed)
    data = _Data(
        train=with_objectives(encoded, options.objectives),
        validation=with_objectives(encode_groups(validation, trainable.renderer), options.objectives),
    )
    length_facts: dict[str, float] = {}
    if options.length_debias:
        log_odds = length_log_odds(data.train)
        data = replace(data, train=without_length(data.train, log_odds, options.length_debias))
        length_facts["length_log_odds"] = log_odds
    # Only now: what cannot be read or loaded leaves no run folder behind. All processes have looked before one writes.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        claim(run, description)
    last_token: Tensor | None = None
    if options.tuning == "head":
        fit = fit_frozen(accelerator, trainable, train, data.train, options, run)
        facts, last_token = fit.facts, fit.last_token
    else:
        facts = _train_by_gradient(accelerator, trainable, data, options, run)
        weights = gathered(trainable.trainable_state())
        if accelerator.is_main_process and options.sharding != "none":
            # One process cannot put shards together: the base is loaded again, whole.
            trainable = load_trainable(options, tuple(domains))
            trainable.load_trainable_state(weights)
            trainable.network.to(accelerator.device)
    if accelerator.is_main_process:
        if options.tuning != "head":
            centre_heads(trainable.network, data.validation or data.train, options.micro_batch_tokens)
        publishing: dict[str, Any] = {
            "train": train,
            "validation": validation,
            "facts": {**facts, **length_facts, "skipped_records": skipped.count},
            "device": str(accelerator.device),
        }
        if last_token is not None:
            publish(*last_token_classifier(options, last_token), target=run / "last_token", **publishing)
        publish(trainable, options, target=run / "model", **publishing)
    accelerator.wait_for_everyone()
    return run / "model"


@dataclass(frozen=True, slots=True)
class _Data:
    train: list[EncodedGroup]
    validation: list[EncodedGroup]


# --- gradient steps -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Progress:
    step: int = 0
    best_accuracy: float = -1.0
    best_step: int = 0
    stale: int = 0
    """Validations since the best one."""


def _is_stale(progress: _Progress, options: RewardOptions) -> bool:
    return options.patience is not None and progress.stale >= options.patience


def _train_by_gradient(
    accelerator: Accelerator, trainable: TrainableReward, data: _Data, options: RewardOptions, run: Path
) -> dict[str, Any]:
    num_steps = max(1, round(options.epochs * steps_in_epoch(len(data.train), options.global_batch_size)))
    trainable.network.to(accelerator.device)
    packing = choose_packing(trainable.network, options.packing, trainable.renderer.max_length)
    placement = place(accelerator, trainable.network, options.sharding)
    prepared = accelerator.prepare(build_optimizer(trainable.network, options, options.head_learning_rate))
    schedule = build_schedule(prepared, num_steps, options)
    # From here on chance is each process's own: dropout must not hide the same units on all of them.
    set_seed(options.seed, device_specific=True)
    progress = _resume(accelerator, trainable, prepared, schedule, run)
    batches = islice(
        step_batches(len(data.train), options.global_batch_size, options.seed, num_steps), progress.step, None
    )
    stopping = _is_stale(progress, options)
    with RunLog(run, active=accelerator.is_main_process, resumed_step=progress.step) as log:
        bar = log.task("training", total=num_steps, completed=progress.step)
        for indices in batches:
            if stopping:
                break
            groups = [data.train[i] for i in indices]
            metrics = _step(placement, prepared, schedule, groups, packing, options)
            progress.step += 1
            log.metrics(progress.step, metrics)
            bar.advance(note=f"loss {metrics['loss']:.3f} accuracy {metrics['accuracy']:.3f}")
            is_end = progress.step == num_steps
            if data.validation and (progress.step % options.eval_every == 0 or is_end):
                accuracy = _validate(placement, data.validation, options)
                log.metrics(progress.step, {"validation_accuracy": accuracy})
                _remember_best(accelerator, trainable, progress, accuracy, run)
            stopping = _is_stale(progress, options)
            if progress.step % options.save_every == 0 or is_end or stopping:
                _save(accelerator, trainable, prepared, schedule, progress, run)
        if stopping:
            log.note(f"stopped early: no better accuracy in {progress.stale} validations")
    if data.validation:
        best = torch.load(best_file(run), map_location="cpu", weights_only=True)
        trainable.load_trainable_state(best)
    return {"steps": progress.step, "best_step": progress.best_step if data.validation else progress.step}


def _step(
    placement: Placement,
    optimizer: Any,
    schedule: Any,
    groups: Sequence[EncodedGroup],
    packing: Packing | None,
    options: RewardOptions,
) -> dict[str, float]:
    """One optimizer update on these groups, over all processes. Returns the step's metrics."""
    accelerator, network = placement.accelerator, placement.network
    network.train()
    work = placement.portions(groups, lambda share: split(share, options.micro_batch_tokens, packing))
    totals = torch.zeros(
        4, dtype=exact_dtype(accelerator.device), device=accelerator.device
    )  # loss, correct, pairs, tokens

    def loss_of(weighted: tuple[Part, float]) -> Tensor:
        part, share = weighted
        batch = flatten(part.groups)
        tensors = tensors_of(part, packing, accelerator.device)
        rewards = network(tensors, by_head=True)  # (N, K)
        loss, correct = _micro_loss(rewards, batch, options)
        loss = loss * share / len(groups)
        tokens = sum(len(item) for item in batch.items)
        totals.add_(
            share
            * torch.stack([loss.detach().to(totals.dtype), correct.to(totals.dtype), *_counts(batch, tokens, totals)])
        )
        return loss

    accumulate(accelerator, network, work, loss_of)
    grad_norm = accelerator.clip_grad_norm_(network.parameters(), options.max_grad_norm)
    learning_rate = schedule.get_last_lr()[0]
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    loss, correct, pairs, tokens = placement.added_up(totals)
    return {
        "loss": loss,
        "accuracy": correct / pairs,
        "grad_norm": float(gathered(grad_norm)),
        "learning_rate": learning_rate,
        "tokens": tokens,
    }


def _counts(batch: MicroBatch, tokens: int, like: Tensor) -> list[Tensor]:
    return [torch.tensor(float(n), dtype=like.dtype, device=like.device) for n in (batch.num_pairs, tokens)]


def _micro_loss(rewards: Tensor, batch: MicroBatch, options: RewardOptions) -> tuple[Tensor, Tensor]:
    """(summed loss, correct pairs) of one micro-batch, from the rewards (N, K) of its completions by each head.

    Each head has a loss of its own, with the weights that its groups were drawn for it; they count alike.
    """
    device = rewards.device
    better, worse = batch.better.to(device), batch.worse.to(device)
    weights, margins = batch.weights.to(device), batch.margins.to(device)
    loss = rewards.new_zeros(())
    for own, drawn in zip(rewards.unbind(dim=1), batch.head_weights.to(device), strict=True):
        of_head = weights * drawn
        loss = loss + pairwise_ranking_loss(own, better, worse, of_head, margins, options.label_smoothing)
        if options.centering:
            loss = loss + options.centering * centering_loss(own, better, worse, of_head)
    return loss / rewards.shape[1], num_correct(rewards_by_own_heads(rewards.detach(), batch), better, worse)


@torch.no_grad()
def _validate(placement: Placement, groups: Sequence[EncodedGroup], options: RewardOptions) -> float:
    """Pairwise accuracy over all held-out pairs; every process scores its share."""
    placement.plain.eval()
    items: list[Rendered] = [item for group in groups for item in group.items]
    batches = batches_by_length([len(item) for item in items], options.micro_batch_tokens)
    scored: list[tuple[int, Any]] = []
    device = placement.accelerator.device
    for batch, share in placement.portions(batches, list):
        rewards = placement.plain(collate([items[i] for i in batch], device), by_head=bool(options.objectives))
        scored.extend(zip(batch, rewards.tolist(), strict=True) if share else ())
    found = dict(gather_object(scored))
    in_order = [found[i] for i in range(len(items))]
    outcomes = pair_outcomes(groups, own_rewards(groups, in_order) if options.objectives else in_order)
    return accuracy_of(outcomes).accuracy


def _remember_best(
    accelerator: Accelerator, trainable: TrainableReward, progress: _Progress, accuracy: float, run: Path
) -> None:
    if accuracy <= progress.best_accuracy:
        progress.stale += 1
        return
    progress.best_accuracy, progress.best_step, progress.stale = accuracy, progress.step, 0
    keep_best(accelerator, trainable, run)


def _save(
    accelerator: Accelerator,
    trainable: TrainableReward,
    optimizer: Any,
    schedule: Any,
    progress: _Progress,
    run: Path,
) -> None:
    best = [progress.best_accuracy, progress.best_step, progress.stale]
    save_training(accelerator, trainable, optimizer, schedule, progress.step, best, run)


def _resume(
    accelerator: Accelerator, trainable: TrainableReward, optimizer: Any, schedule: Any, run: Path
) -> _Progress:
    found = resume_training(accelerator, trainable, optimizer, schedule, run)
    if found is None:
        return _Progress()
    step, (accuracy, best_step, stale) = found
    return _Progress(step, accuracy, best_step, stale)
