"""Reinforcement learning from human feedback, whole and in rounds.

InstructGPT (Ouyang et al., arXiv 2203.02155), section 3.1: a policy is fine-tuned on demonstrations; people rank what
it says; a reward model learns their ranks; PPO makes the policy say what the reward model likes. Then again, with
comparisons collected on the policy that came out. Departures:

1. A gold scorer can stand for the people, so that a run can be repeated and its end judged.
2. Every round is measured: the new policy against the one before it, on held-out prompts.
3. PPO can run with several seeds in a round; the best by held-out reward goes on.
4. Each round's KL is counted from where its PPO started, the last round's policy, unless `start: sft`.

Kept: a round's reward model is trained from its base, on old and new comparisons together.

A stage is done when its result lies in the run folder under its final name. A run that is killed goes on with the stage
that was under way, and that stage where its own checkpoint was. What was done by other means is taken as it lies: a
stage can be run by itself, on more devices, into the folder where the loop would have put it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from feedback.jsonl import located_records, read_records, replacing, write_records
from feedback.records import parse_completions
from training.distributed import require_shardable
from training.loop import start_accelerator
from training.options import OptionsError
from training.ppo import train_ppo
from training.reward_model import train_reward_model
from training.reward_sources import OpenRemote, RewardSource, RewardSourceOptions
from training.rlhf_options import (
    RlhfOptions,
    ppo_options,
    require_whole,
    reward_options,
    sft_options,
    shardings,
)
from training.rlhf_rankings import Score, peoples_rankings, ranked_by, require_store, scores_by_prompt
from training.rlhf_report import write_rlhf_report
from training.rlhf_story import EVALUATION, RANKINGS, Expectation, ppo_folder, ppo_story, read_story, round_folder
from training.rollouts import batch_of_prompts
from training.runs import claim, file_digest, refuse_taken
from training.sampling import Sampling, Task, parse_sendable, tasks_of
from training.sft import train_sft
from training.stages import made_by_first
from training.winrate import Sides, as_json, compare_models, mean_length, meetings_by_reward

Draw = Callable[[str, Sequence[Task], Sampling, Path], None]
"""Completions of these prompts by the policy in this folder, into this file, whole or not at all. Handed in: how a
model answers many prompts at once is the business of serving."""

POLICY, REWARD_MODEL, REPORT = "policy", "reward-model", "report.html"


@dataclass(frozen=True, slots=True)
class Tools:
    """What the loop is given by whoever starts it."""

    draw: Draw
    open_remote: OpenRemote | None = None
    """Makes the scorer of a service."""
    say: Callable[[str], None] = field(default=lambda text: None)
    """Tells which stage begins."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A whole run."""

    report: Path
    unmet: Sequence[Expectation]
    """What the run was to show and did not."""


def train_rlhf(options: RlhfOptions, tools: Tools) -> Finished:
    """Runs (or goes on with) all rounds. Raises `OptionsError`, `DataError`, `RewardError`, and what `draw` raises.

    Where people rank and have not ranked enough yet, it stops with `rlhf_rankings.AwaitingPeopleError`.
    """
    # Whole: adapters name the policy they began from by its path, and are loaded from other places.
    run = Path(options.output).expanduser().resolve()
    require_whole(options)
    require_store(options.rank)
    description = _described(options)
    refuse_taken(run, description, result=POLICY)
    # That of the first PPO: a launch that cannot work is refused before anything is drawn.
    ppo = ppo_options(options, str(run), options.base, "", options.ppo_seeds[0])
    accelerator = start_accelerator(ppo, frozen=ppo.tuning == "top_layers")
    for sharding in shardings(options):
        require_shardable(accelerator, sharding)
    held_out = _tasks(options.evaluate.prompts)[: options.evaluate.num_prompts]
    loop = _Loop(options, tools, accelerator, run, _tasks(options.sample.prompts), held_out)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        claim(run, description)
    first = policy = loop.fine_tune()
    answers = loop.answer(policy, run / "answers.jsonl")
    for number in range(1, options.rounds + 1):
        samples = loop.sample(number, policy)
        loop.rank(number, samples)
        reward_model = loop.train_reward_model(number)
        policy = loop.improve(number, policy if options.start == "last" else first, reward_model)
        answers = loop.evaluate(number, policy, answers, reward_model)
        if accelerator.is_main_process:
            write_rlhf_report(run / REPORT, read_story(run, options))
    story = read_story(run, options)
    loop.made(run / REWARD_MODEL, lambda: _copy(Path(reward_model), run / REWARD_MODEL))
    loop.made(run / POLICY, lambda: _copy(Path(policy), run / POLICY))
    return Finished(run / REPORT, [one for one in story.expectations if not one.met])


@dataclass(frozen=True, slots=True)
class _Loop:
    """The stages. Each gives what it makes, and makes it where it is not there yet."""

    options: RlhfOptions
    tools: Tools
    accelerator: Accelerator
    run: Path
    prompts: Sequence[Task]
    held_out: Sequence[Task]

    def fine_tune(self) -> str:
        """The policy that the first round begins with."""
        if self.options.sft is None:
            return self.options.base
        folder = self.run / "sft"
        if not (folder / "policy").is_dir():
            self._say("fine-tuning on demonstrations")
            train_sft(sft_options(self.options, str(folder)))
        return str(folder / "policy")

    def sample(self, number: int, policy: str) -> Path:
        """What is to be ranked."""
        asked = self.options.sample
        target = self._round(number) / "samples.jsonl"

        def draw() -> None:
            self._say(f"{asked.count} completions a prompt", number)
            size = asked.prompts_per_round or len(self.prompts)
            # Where a round takes up the prompts anew, the same one may come twice: it is asked once.
            places = dict.fromkeys(batch_of_prompts(len(self.prompts), number - 1, size, self.options.seed))
            chosen = [self.prompts[place] for place in places]
            self.tools.draw(policy, chosen, self._sampling(asked.count, number), target)

        return self.made(target, draw)

    def rank(self, number: int, samples: Path) -> None:
        """`rankings.jsonl`: the comparisons that this round adds."""
        target = self._round(number) / RANKINGS
        self.made(target, lambda: self._rank(number, samples, target))

    def _rank(self, number: int, samples: Path, target: Path) -> None:
        rank = self.options.rank
        if rank.gold is not None:
            self._say("ranking by the gold scorer", number)
            with self._scorer(rank.gold) as scorer:
                records = ranked_by(scorer.score, read_records([samples], parse_completions), f"round-{number}")
        else:
            self._say("looking for what people ranked", number)
            earlier = [self._round(one) / RANKINGS for one in range(1, number)]
            records = peoples_rankings(rank, number, samples, earlier)
        write_records(target, records)

    def train_reward_model(self, number: int) -> str:
        """Learns all comparisons so far, old and new."""
        folder = self._round(number) / "reward"
        if not (folder / "model").is_dir():
            self._say("reward model", number)
            rankings = [str(self._round(one) / RANKINGS) for one in range(1, number + 1)]
            train_reward_model(reward_options(self.options, str(folder), rankings))
        return str(folder / "model")

    def improve(self, number: int, policy: str, reward_model: str) -> str:
        """PPO with every seed; the policy with the best held-out reward."""
        folders = [ppo_folder(self.run, number, seed) for seed in self.options.ppo_seeds]
        for seed, folder in zip(self.options.ppo_seeds, folders, strict=True):
            if not (folder / "policy").is_dir():
                self._say(f"PPO, seed {seed}", number)
                train_ppo(
                    ppo_options(self.options, str(folder), policy, reward_model, seed),
                    open_remote=self.tools.open_remote,
                )
        best = max(folders, key=lambda folder: ppo_story(folder, self.options).after.reward)
        return str(best / "policy")

    def evaluate(self, number: int, policy: str, before: Path, reward_model: str) -> Path:
        """Holds the round's policy against the one before it; the answers of the new one."""
        folder = self._round(number)
        answers = self.answer(policy, folder / "answers.jsonl")

        def hold() -> None:
            self._say("side by side with the policy before", number)
            ours = self.options.evaluate.judge or self.options.rank.gold
            judge = ours or RewardSourceOptions(model=reward_model)
            sides = _sides(answers, before)
            with self._scorer(judge) as scorer:
                found = _compared(scorer.score, sides, (f"round {number}", _name_before(number)), _name_of(judge))
            with replacing(folder / EVALUATION) as partial:
                partial.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

        self.made(folder / EVALUATION, hold)
        return answers

    def answer(self, policy: str, target: Path) -> Path:
        """What a policy says to the held-out prompts: the same chance for all policies."""

        def draw() -> None:
            self._say(f"answers of {policy} to held-out prompts")
            self.tools.draw(policy, self.held_out, self._sampling(self.options.evaluate.count, 0), target)

        return self.made(target, draw)

    def made(self, target: Path, make: Callable[[], None]) -> Path:
        """`target`, which one process makes where it is not there yet."""
        made_by_first(self.accelerator, target, make)
        return target

    def _sampling(self, count: int, stream: int) -> Sampling:
        asked = self.options.sample
        # Each round its own chance: prompts may come again.
        seed = self.options.seed + stream
        return Sampling(count, temperature=asked.temperature, max_tokens=asked.max_tokens, seed=seed)

    def _scorer(self, source: RewardSourceOptions) -> RewardSource:
        return RewardSource(source, device=self.options.device, open_remote=self.tools.open_remote)

    def _round(self, number: int) -> Path:
        return round_folder(self.run, number)

    def _say(self, what: str, number: int | None = None) -> None:
        if self.accelerator.is_main_process:
            self.tools.say(what if number is None else f"round {number} of {self.options.rounds}: {what}")


def _compared(score: Score, sides: Sequence[Sides], names: tuple[str, str], judge: str) -> dict[str, Any]:
    """The win rate of the first, as plain values."""
    rewards = scores_by_prompt(score, [(side.prompt, side.completions) for side in sides])
    lengths = (
        mean_length([one for side in sides for one in side.first]),
        mean_length([one for side in sides for one in side.second]),
    )
    return as_json(compare_models(names, judge, meetings_by_reward(sides, rewards), lengths))


def _sides(new: Path, old: Path) -> list[Sides]:
    """Both files hold the held-out prompts in their order."""
    pairs = zip(read_records([new], parse_completions), read_records([old], parse_completions), strict=True)
    return [Sides(one.prompt, one.completions, other.completions) for one, other in pairs]


def _name_before(number: int) -> str:
    return "the start" if number == 1 else f"round {number - 1}"


def _name_of(source: RewardSourceOptions) -> str:
    return source.model or source.url or source.function or ""


def _tasks(files: Sequence[str]) -> list[Task]:
    tasks = tasks_of(located_records([Path(file).expanduser() for file in files], parse_sendable))
    if not tasks:
        raise OptionsError(f"no prompt in {', '.join(files)}")
    return tasks


def _described(options: RlhfOptions) -> dict[str, Any]:
    """The options, and what the prompt files hold; each stage looks at its own data."""
    files = [*options.sample.prompts, *options.evaluate.prompts]
    digests = {file: file_digest(file) for file in files if Path(file).expanduser().is_file()}
    return {**options.model_dump(mode="json"), "data": digests}


def _copy(source: Path, target: Path) -> None:
    """Appears only when whole."""
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        shutil.copytree(source, partial, dirs_exist_ok=True)
        partial.chmod(0o755)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
