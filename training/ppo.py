"""PPO on a reward, kept near where it started by a KL penalty.

InstructGPT (Ouyang et al., arXiv 2203.02155), section 3.5 and appendix C.4; the algorithm is that of Ziegler et al.
(arXiv 1909.08593) with the details that Huang et al. (arXiv 2403.17031) found to matter. It maximises

    E[ r(x, y) − β · log(π(y|x) / π_ref(y|x)) ] + γ · E[ log π(x) ]                                  (eq. 2)

Departures:

1. Completions that do not come to their end token are penalised, as Huang et al. do (detail 23).
2. The value model is, unless `value_base` says otherwise, two layers on the frozen reference's hidden states; the
   paper's is a whole model that starts as the reward model. Either has its own rate and gradient clipping.
3. A completion that was cut off at its longest ends there: the value behind it is 0, as behind an end token.
4. Advantages are whitened over the batch of an iteration, not over a minibatch; token losses are divided by the
   minibatch's tokens, not averaged by completion first.
5. Rates follow a cosine over iterations, or stay (the default, as the paper's do after 10 iterations).
6. Dropout is off throughout.
7. A run can stop by the exact KL on held-out prompts (`max_kl`), or when their reward rises no more (`patience`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from feedback.jsonl import Skipped
from training.actors import Frozen
from training.advantages import ScoreScale, penalise_missing_end
from training.batches import epoch_order
from training.distributed import require_shardable
from training.kl import AdaptiveKL, FixedKL, KLController
from training.loop import schedule_factor, start_accelerator
from training.moving_average import WeightAverage
from training.ppo_evaluation import HeldOut, evaluate, write_samples
from training.ppo_options import PpoOptions, require_possible
from training.ppo_parts import PpoParts, Prompts, build_parts, build_sampler, read_all, weight_files
from training.ppo_state import load_progress, save_progress
from training.ppo_update import Experience, UpdateMetrics, build_experience, update
from training.reward_sources import OpenRemote, RewardSource
from training.rollouts import Collector, Sampled, batch_of_prompts, rollout_of
from training.runlog import RunLog
from training.runs import claim, described, refuse_taken

RESULT = "policy"


def train_ppo(options: PpoOptions, *, open_remote: OpenRemote | None = None) -> Path:
    """Runs (or goes on with) the training that `options` describe; returns the folder of the finished policy.

    `open_remote` makes the scorer of a service. Raises `OptionsError`, `feedback.jsonl.DataError`,
    `reward.errors.RewardError`.
    """
    run = Path(options.output)
    require_possible(options)
    files = [*options.prompts, *options.eval_prompts, *options.ptx, *weight_files(options)]
    description = described(options, files)
    refuse_taken(run, description, RESULT)
    # With a shared trunk most of the work is passes through what is frozen.
    accelerator = start_accelerator(options, frozen=options.tuning == "top_layers")
    require_shardable(accelerator, options.sharding)
    set_seed(options.seed)
    parts = build_parts(accelerator, options)
    prompts = read_all(parts.actors.policy, options, Skipped())
    source = RewardSource(options.reward, device=options.device, open_remote=open_remote)
    with ExitStack() as stack:
        reward = stack.enter_context(source)
        # Only now: what cannot be read or loaded leaves no run folder behind. All processes look before one writes.
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            claim(run, description)
        collector = Collector(
            accelerator,
            parts.actors,
            build_sampler(parts, options),
            reward.score,
            options.max_new_tokens,
            options.micro_batch_tokens,
            options.seed,
        )
        progress = _iterate(accelerator, parts, prompts, collector, options, run)
    _publish(parts, progress, options, run)
    return run / RESULT


@dataclass(slots=True)
class Progress:
    """Where a run is."""

    iteration: int
    """Iterations that are done."""
    controller: KLController
    average: WeightAverage | None
    stopped: bool = False
    """By `max_kl` or `patience`."""
    best_reward: float = -math.inf
    """On held-out prompts: score less β · exact KL."""
    stale: int = 0
    """Evaluations since."""


def _iterate(
    accelerator: Accelerator,
    parts: PpoParts,
    prompts: Prompts,
    collector: Collector,
    options: PpoOptions,
    run: Path,
) -> Progress:
    total = num_iterations(len(prompts.train), options)
    progress = Progress(0, _controller(options), _average(parts, options))
    load_progress(accelerator, parts, progress, run)
    with RunLog(run, active=accelerator.is_main_process, resumed_step=progress.iteration) as log:
        if prompts.left_out:
            log.note(f"{prompts.left_out} prompts are longer than {options.max_prompt_tokens} tokens and left out")
        bar = log.task("training", total=total, completed=progress.iteration)
        _tell_sampler(accelerator, collector, progress)
        if progress.iteration == 0:
            _evaluate(accelerator, parts, prompts, collector, progress, options, run, log)
        while progress.iteration < total and not progress.stopped:
            metrics = _iteration(parts, prompts, collector, progress, total, options)
            progress.iteration += 1
            _tell_sampler(accelerator, collector, progress)
            log.metrics(progress.iteration, metrics)
            bar.advance(note=f"score {metrics['score']:.3f} KL {metrics['kl']:.2f}")
            is_end = progress.iteration == total
            if progress.iteration % options.eval_every == 0 or is_end:
                _evaluate(accelerator, parts, prompts, collector, progress, options, run, log)
            if progress.iteration % options.save_every == 0 or is_end or progress.stopped:
                save_progress(accelerator, parts, progress, run)
    return progress


def _tell_sampler(accelerator: Accelerator, collector: Collector, progress: Progress) -> None:
    collector.sampler.weights_changed(progress.iteration)
    # None asks a server before the one that leads it has made it take the weights.
    accelerator.wait_for_everyone()


def _iteration(
    parts: PpoParts, prompts: Prompts, collector: Collector, progress: Progress, total: int, options: PpoOptions
) -> dict[str, float]:
    """Rollout, experience, epochs of updates. Returns the iteration's metrics."""
    size, iteration = options.global_batch_size, progress.iteration
    chosen = batch_of_prompts(len(prompts.train), iteration, size, options.seed)
    samples, frozen = collector.collect([prompts.train[place] for place in chosen], f"rollout/{iteration}")
    ended = torch.tensor([sample.ended for sample in samples])
    scale = ScoreScale(options.score_shift, options.score_scale, options.score_clip)

    def shaped(scores: Tensor) -> Tensor:
        return penalise_missing_end(scale.apply(scores), ended, options.missing_end_penalty, options.missing_end)

    rollout = rollout_of(frozen, torch.tensor([sample.score for sample in samples]), shaped)
    coefficient = progress.controller.coefficient
    experience = build_experience(rollout, options, coefficient)
    factor = schedule_factor(iteration, total, options.warmup_share, options.final_rate_share)
    parts.learner.set_rate(factor)
    parts.learner.rows = frozen
    orders = [epoch_order(size, options.seed, iteration * options.ppo_epochs + k) for k in range(options.ppo_epochs)]
    learnt = update(parts.learner, experience, options, orders)
    parts.learner.rows = ()
    progress.controller = progress.controller.updated(experience.kl, size)
    if progress.average is not None:
        progress.average.update(parts.writer.weights())
    return {
        **_sampling_metrics(samples, frozen),
        **_learning_metrics(experience, learnt),
        "reward": float(rollout.scores.mean()) - coefficient * experience.kl,
        "kl_coef": coefficient,
        "learning_rate": options.learning_rate * factor,
        **({"ptx_loss": parts.learner.mix_loss} if options.ptx else {}),
    }


def _sampling_metrics(samples: Sequence[Sampled], frozen: Sequence[Frozen]) -> dict[str, float]:
    scores = torch.tensor([sample.score for sample in samples], dtype=torch.float64)
    count = len(samples)
    off = [
        (torch.tensor(sample.sampled_logprobs) - row.old_logprobs).abs()
        for sample, row in zip(samples, frozen, strict=True)
        if sample.sampled_logprobs is not None
    ]
    return {
        **({"sampler_error": float(torch.cat(off).mean())} if off else {}),
        "score": float(scores.mean()),
        "score_std": float(scores.std(correction=0)),
        "length": sum(len(sample.sequence.completion) for sample in samples) / count,
        "ended_share": sum(sample.ended for sample in samples) / count,
        "entropy": sum(row.entropy for row in frozen) / count,
    }


def _learning_metrics(experience: Experience, learnt: UpdateMetrics) -> dict[str, float]:
    return {
        "kl": experience.kl,
        "explained_variance": experience.explained_variance,
        "advantage_std": experience.advantage_std,
        **{name: value for name, value in asdict(learnt).items() if name != "steps"},
    }


def _evaluate(
    accelerator: Accelerator,
    parts: PpoParts,
    prompts: Prompts,
    collector: Collector,
    progress: Progress,
    options: PpoOptions,
    run: Path,
    log: RunLog,
) -> None:
    """Measures on held-out prompts, and keeps the weights unless they are too far off, or worse where that counts."""
    if not prompts.held_out:
        return
    found, table = evaluate(collector, prompts.held_out)
    scaled = (found.score - options.score_shift) * options.score_scale
    reward = scaled - progress.controller.coefficient * found.kl
    is_within = options.max_kl is None or found.kl <= options.max_kl
    is_better = reward > progress.best_reward
    progress.best_reward = max(reward, progress.best_reward)
    progress.stale = 0 if is_better else progress.stale + 1
    is_stale = options.patience is not None and progress.stale >= options.patience
    progress.stopped = is_stale or not is_within
    if is_within and (is_better or options.patience is None):
        parts.keep_policy(run, progress.average)
    if accelerator.is_main_process:
        facts = {f"eval_{name}": value for name, value in asdict(found).items()}
        log.metrics(progress.iteration, {**facts, "eval_reward": reward})
        log.note(_one_line(progress.iteration, found))
        write_samples(run, progress.iteration, table)
        if progress.stopped:
            reason = f"no better reward in {progress.stale} evaluations" if is_within else "KL past max_kl"
            log.note(f"stopped: {reason}; the weights are those of the last evaluation that was right")
    accelerator.wait_for_everyone()


def _one_line(iteration: int, found: HeldOut) -> str:
    return (
        f"iteration {iteration}: held-out score {found.score:.3f}, exact KL {found.kl:.2f} nats a completion, "
        f"{found.length:.0f} tokens, distinct {found.distinct:.2f}"
    )


def _publish(parts: PpoParts, progress: Progress, options: PpoOptions, run: Path) -> None:
    """Policy last: where it is, the run is finished. All processes take part."""
    if options.eval_prompts:
        parts.take_kept_policy(run, progress.average)
    parts.save_value(run)
    if progress.average is not None:
        parts.writer.write(run / "policy-ema", progress.average.weights, unless_there=True)
    parts.writer.write(run / RESULT)


def num_iterations(num_prompts: int, options: PpoOptions) -> int:
    """How many batches of completions the run takes."""
    if options.iterations is not None:
        return options.iterations
    return max(1, round(options.epochs * num_prompts / options.global_batch_size))


def _controller(options: PpoOptions) -> KLController:
    if options.kl_target is None:
        return FixedKL(options.kl_coef)
    return AdaptiveKL(options.kl_coef, options.kl_target, options.kl_horizon)


def _average(parts: PpoParts, options: PpoOptions) -> WeightAverage | None:
    if options.ema_decay is None:
        return None
    return WeightAverage(parts.writer.weights(), options.ema_decay)
