"""What the run folder of a loop tells: read from the logs and results of its stages, whichever are there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feedback.jsonl import Skipped
from reward.manifest import Accuracy, load_manifest
from training.comparisons import read_comparisons
from training.evaluation import POOLED, accuracy_of, length_rewards, pair_outcomes
from training.fitting import DECIDING
from training.options import OptionsError
from training.rlhf_options import RlhfOptions, ppo_options, reward_options
from training.runlog import LOG_NAME

RANKINGS, EVALUATION = "rankings.jsonl", "evaluation.json"


@dataclass(frozen=True, slots=True)
class FineTuning:
    """The first stage, by the loss on held-out demonstrations, nats a token."""

    curve: Sequence[tuple[int, float]]
    """(step, loss); step 0 is before."""

    @property
    def before(self) -> float:
        return self.curve[0][1]

    @property
    def after(self) -> float:
        """Of the weights that were kept: the best."""
        return min(loss for _, loss in self.curve[1:])


@dataclass(frozen=True, slots=True)
class RewardModelStory:
    """A round's reward model on held-out comparisons; None where there are none."""

    accuracy: Accuracy | None
    longer: Accuracy | None
    """What "the longer one is better" gets on the same pairs."""


@dataclass(frozen=True, slots=True)
class HeldOutPoint:
    """Where a run of PPO stood on held-out prompts."""

    iteration: int
    score: float
    """Mean of the round's reward model."""
    kl: float
    """Exact, nats a completion, from where the run started."""
    reward: float
    """Score less β · KL."""
    length: float
    """Tokens."""
    distinct: float
    """Share of a completion's tokens that are different."""


@dataclass(frozen=True, slots=True)
class PpoStory:
    """One run of PPO."""

    seed: int
    curve: Sequence[HeldOutPoint]
    training: Sequence[tuple[int, float, float]]
    """(iteration, score, k1) of every batch."""
    after: HeldOutPoint
    """Of the weights that were kept."""

    @property
    def before(self) -> HeldOutPoint:
        return self.curve[0]

    @property
    def gain(self) -> float:
        """Of the score."""
        return self.after.score - self.before.score


@dataclass(frozen=True, slots=True)
class RoundStory:
    """One round that is done."""

    number: int
    num_rankings: int
    reward_model: RewardModelStory
    ppo: Sequence[PpoStory]
    chosen_seed: int
    comparison: dict[str, Any]
    """The new policy against the one before, as `training.winrate.as_json` gives it."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """Something that the run was to show."""

    what: str
    found: str
    met: bool


@dataclass(frozen=True, slots=True)
class Story:
    """A run so far."""

    output: str
    base: str
    fine_tuning: FineTuning | None
    rounds: Sequence[RoundStory]
    expectations: Sequence[Expectation]


def round_folder(run: Path, number: int) -> Path:
    return run / f"round-{number}"


def ppo_folder(run: Path, number: int, seed: int) -> Path:
    return round_folder(run, number) / f"ppo-{seed}"


def read_story(run: Path, options: RlhfOptions) -> Story:
    """Of all rounds that are done."""
    fine_tuning = _fine_tuning(run / "sft") if options.sft is not None else None
    done = [n for n in range(1, options.rounds + 1) if (round_folder(run, n) / EVALUATION).is_file()]
    rounds = [_round(run, number, options) for number in done]
    return Story(options.output, options.base, fine_tuning, rounds, _expectations(options, fine_tuning, rounds))


def ppo_story(folder: Path, options: RlhfOptions) -> PpoStory:
    """Of one run of PPO that is done. Raises `OptionsError` where its log has lost what it measured."""
    lines = _log(folder)
    curve = [
        HeldOutPoint(
            int(line["step"]),
            *(float(line[f"eval_{name}"]) for name in ("score", "kl", "reward", "length", "distinct")),
        )
        for line in lines
        if "eval_score" in line
    ]
    if not curve:
        raise OptionsError(f"{folder / LOG_NAME}: holds no evaluation; delete {folder} to train it anew")
    batches = [(int(line["step"]), float(line["score"]), float(line["kl"])) for line in lines if "score" in line]
    seed = int(folder.name.rpartition("-")[2])
    settings = ppo_options(options, str(folder), options.base, "", seed)
    within = [point for point in curve if settings.max_kl is None or point.kl <= settings.max_kl]
    # As the trainer keeps weights: the last that were near enough, or the best where it looks for these.
    after = within[-1] if settings.patience is None else max(within, key=lambda point: point.reward)
    return PpoStory(seed, curve, batches, after)


def _round(run: Path, number: int, options: RlhfOptions) -> RoundStory:
    folder = round_folder(run, number)
    runs = [ppo_story(ppo_folder(run, number, seed), options) for seed in options.ppo_seeds]
    with (folder / RANKINGS).open(encoding="utf-8") as file:
        num_rankings = sum(1 for _ in file)
    return RoundStory(
        number,
        num_rankings,
        _reward_model(folder / "reward" / "model", options),
        runs,
        max(runs, key=lambda one: one.after.reward).seed,
        json.loads((folder / EVALUATION).read_text(encoding="utf-8")),
    )


def _reward_model(folder: Path, options: RlhfOptions) -> RewardModelStory:
    settings = reward_options(options, str(folder), [])
    if not settings.validation:
        return RewardModelStory(None, None)
    groups = read_comparisons(settings.validation, settings.skip_invalid, Skipped())
    longer = accuracy_of(pair_outcomes(groups, length_rewards(groups)))
    manifest = load_manifest(folder)
    assert manifest is not None
    # A single source has no line for all of them.
    accuracy = manifest.accuracy.get(POOLED) or next(iter(manifest.accuracy.values()))
    return RewardModelStory(accuracy, longer)


def _fine_tuning(folder: Path) -> FineTuning | None:
    curve = [(int(line["step"]), float(line[DECIDING])) for line in _log(folder) if DECIDING in line]
    return FineTuning(curve) if len(curve) > 1 else None


def _log(folder: Path) -> list[dict[str, Any]]:
    path = folder / LOG_NAME
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _expectations(
    options: RlhfOptions, fine_tuning: FineTuning | None, rounds: Sequence[RoundStory]
) -> list[Expectation]:
    expect = options.expect
    found = []
    if expect.sft_lowers_loss and fine_tuning is not None:
        what = f"{fine_tuning.before:.3f} → {fine_tuning.after:.3f} nats a token"
        found.append(Expectation("fine-tuning lowers the held-out loss", what, fine_tuning.after < fine_tuning.before))
    for one in rounds:
        where = f"round {one.number}: " if options.rounds > 1 else ""
        model = one.reward_model
        if expect.reward_model_beats_length and model.accuracy is not None and model.longer is not None:
            found.append(
                Expectation(
                    f"{where}the reward model beats “the longer one is better”",
                    f"{model.accuracy.accuracy:.1%} against {model.longer.accuracy:.1%}, {model.accuracy.pairs} pairs",
                    model.accuracy.accuracy > model.longer.accuracy,
                )
            )
        if expect.score_gain is not None:
            gains = [run.gain for run in one.ppo]
            met = sum(gain >= expect.score_gain for gain in gains)
            found.append(
                Expectation(
                    f"{where}PPO raises the held-out score by {expect.score_gain:g} in every seed",
                    f"{', '.join(f'{gain:+.2f}' for gain in gains)}: {met} of {len(gains)}",
                    met == len(gains),
                )
            )
        if expect.max_kl is not None:
            distances = [run.after.kl for run in one.ppo]
            found.append(
                Expectation(
                    f"{where}at an exact KL of {expect.max_kl:g} nats at most",
                    ", ".join(f"{kl:.2f}" for kl in distances),
                    max(distances) <= expect.max_kl,
                )
            )
    return found
