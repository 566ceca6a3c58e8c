"""Best-of-N distillation: the policy learns to say at once what the best of its N answers was.

Rejection-sampling fine-tuning of Llama 2 (Touvron et al., arXiv 2307.09288), section 3.2.3: for each prompt sample K
completions from the policy, keep the one that the reward model likes best, and fine-tune on these as on demonstrations.
Departures:

1. One round a run. Winners of earlier rounds, which the paper mixes in, are named in `train`.
2. The paper keeps the best of every prompt. Here a winner may also be required to reach a reward or a percentile
   (`min_reward`), or to be among the best of all (`top_share`): the best of K bad answers is a bad answer.
3. Completions that a token limit ended are left out: learnt from, they would teach to stop in the middle. So are those
   said before, word for word.
4. `teacher`: completions may be another model's. The paper does so for its smaller models, with the largest one's.
5. Fine-tuning is `training.sft`, with its departures.

Stages, each of which is whole or not there in the run folder, so that a killed run goes on: `samples.jsonl`,
`scored.jsonl`, `winners.jsonl` with `selection.json`, `sft/`, `policy/`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field

from feedback.jsonl import Skipped, read_records, replacing, write_records
from feedback.records import Completions, RecordError, parse_completions
from training.distributed import require_shardable
from training.fitting import RESULT
from training.loop import start_accelerator
from training.options import OptionsError
from training.runs import OPTIONS_NAME, claim, described, refuse_taken
from training.sampling import Draft, Drawn, Outcome, Sampling, Task, read_tasks
from training.sft import SftOptions, train_sft
from training.stages import made_by_first
from training.winners import Rules, select_winners

_RULES = ("winners_per_prompt", "min_reward", "top_share", "keep_cut_off")
_SCORED_AT_ONCE = 512
"""Prompts: bounds what is held in memory."""


class DistillOptions(SftOptions):
    """`winnow train distill`."""

    prompts: list[str] = Field(min_length=1)
    """Files of records with a `prompt`: what completions are sampled for."""
    train: list[str] = Field(default=[])
    """Demonstrations that are learnt beside the winners: those of earlier rounds, or what the policy was trained on."""
    teacher: str | None = None
    """Whose completions are sampled: a folder, hub id, `package:NAME`, or a server as `URL#MODEL`. None: `base`."""
    teacher_key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the server's key."""
    samples_per_prompt: int = Field(default=8, ge=1)
    """Completions to choose from."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling. The paper goes a little above 1 where many are drawn."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Share of the probability to draw from; None: all."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest completion; what it cuts off is not learnt from."""
    samples_at_once: int = Field(default=8, ge=1)
    """Prompts, or calls to a server, at once."""
    calls_per_minute: float | None = Field(default=None, gt=0)
    """Calls to a server begun in a minute; None: no limit."""
    max_failed_prompts: int = Field(default=0, ge=0)
    """So many prompts may fail for good and are done without."""

    reward_model: str = "default"
    """Who judges: folder, hub id, or `default`."""
    winners_per_prompt: int = Field(default=1, ge=1)
    """Most winners of one prompt."""
    min_reward: float | Annotated[str, Field(pattern=r"^p(100|[0-9]{1,2}(\.[0-9]+)?)$")] | None = None
    """Least reward of a winner: a number, or a percentile of the reward model's references (`p50`)."""
    top_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the winners that are kept, those with the highest rewards of all."""
    keep_cut_off: bool = False
    """Learn also from completions that ended at `max_new_tokens`."""
    fit: bool = True
    """`false`: stop when the winners are written, to fine-tune on them elsewhere."""

    @property
    def sampling(self) -> Sampling:
        """How completions are drawn."""
        return Sampling(
            count=self.samples_per_prompt,
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_new_tokens,
            seed=self.seed,
        )

    @property
    def rules(self) -> Rules:
        """What makes a winner."""
        is_percentile = isinstance(self.min_reward, str)
        return Rules(
            per_prompt=self.winners_per_prompt,
            min_reward=None if isinstance(self.min_reward, str) else self.min_reward,
            min_percentile=float(str(self.min_reward)[1:]) if is_percentile else None,
            top_share=self.top_share,
            keep_cut_off=self.keep_cut_off,
        )

    def fine_tuning(self, run: Path) -> SftOptions:
        """What is left to do when the winners are there."""
        own = {name: getattr(self, name) for name in SftOptions.model_fields}
        return SftOptions(**own | {"output": str(run / "sft"), "train": [str(run / "winners.jsonl"), *self.train]})


class Draw(Protocol):
    """Draws completions, handed in from the front door: it knows the models and servers."""

    def __call__(
        self, begin: Callable[[str], Sequence[Task]], keep: Callable[[Task, Sequence[Drawn]], None]
    ) -> Outcome:
        """`begin` says what is missing, told the model's name; what comes goes to `keep`."""


Score = Callable[[Iterable[Sequence[Completions]]], Iterator[Sequence[Mapping[str, Any]]]]
"""Scores completions, some at a time: records with `rewards` and `percentiles`, in order. Its model is in memory for as
long as there are any."""


def distill(options: DistillOptions, draw: Draw, score: Score) -> Path:
    """Runs (or goes on with) what `options` describe; returns the folder of the policy, or the winners without `fit`.

    Raises `OptionsError`, `feedback.jsonl.DataError`, `reward.errors.RewardError`.
    """
    run = Path(options.output)
    # `fit` may change from one start to the next: what was done so far is the same.
    files = [*options.prompts, *options.train, *options.validation]
    description = {name: value for name, value in described(options, files).items() if name != "fit"}
    accelerator = start_accelerator(options)
    require_shardable(accelerator, options.sharding)
    may_choose_anew = not (run / "winners.jsonl").is_file()
    accelerator.wait_for_everyone()
    refuse_taken(run, _with_rules_of(run, description) if may_choose_anew else description, result=RESULT)
    if accelerator.is_main_process and may_choose_anew:
        _take_rules(run, description)
    skipped = Skipped()
    tasks = read_tasks([Path(file).expanduser() for file in options.prompts], skipped if options.skip_invalid else None)
    if not tasks:
        raise OptionsError(f"prompts: no prompt in {', '.join(options.prompts)}")
    fine_tuning = options.fine_tuning(run)
    # A kill between the two leaves a finished policy in its own run folder.
    done = Path(fine_tuning.output) / RESULT
    is_fitted = done.exists()
    accelerator.wait_for_everyone()

    def win() -> None:
        claim(run, description)
        if not (run / "samples.jsonl").is_file():
            _sample(options, run / "samples.jsonl", tasks, draw)
        if not (run / "scored.jsonl").is_file():
            write_records(run / "scored.jsonl", _scored(run / "samples.jsonl", score))
        _choose(options, run, skipped)

    made_by_first(accelerator, run / "winners.jsonl", win)
    if not options.fit:
        return run / "winners.jsonl"
    folder = done if is_fitted else train_sft(fine_tuning)
    made_by_first(accelerator, run / RESULT, lambda: folder.rename(run / RESULT))
    return run / RESULT


def _with_rules_of(run: Path, description: dict[str, Any]) -> dict[str, Any]:
    """The description as it would be with the rules that the folder names."""
    path = run / OPTIONS_NAME
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return description | {name: before[name] for name in _RULES if name in before}


def _take_rules(run: Path, description: dict[str, Any]) -> None:
    """Nothing has been chosen yet: samples and rewards are good for other rules too."""
    if (run / OPTIONS_NAME).is_file():
        claim(run, description)


def _sample(options: DistillOptions, target: Path, tasks: Sequence[Task], draw: Draw) -> None:
    with Draft(target, tasks, options.sampling) as draft:
        outcome = draw(draft.begin, draft.keep)
        failures = outcome.failures
        if len(failures) > options.max_failed_prompts or outcome.not_asked:
            raise OptionsError(
                f"prompts: {len(failures)} of {len(tasks)} failed, the first at {failures[0].place}: "
                f"{failures[0].problem}. What came is kept; start again to ask for the rest, or allow "
                "max_failed_prompts"
            )
        draft.finish(draft.records())


def _scored(samples: Path, score: Score) -> Iterator[dict[str, Any]]:
    records, read_again = (read_records([samples], _as_it_is) for _ in range(2))
    chunks = iter(lambda: list(islice(records, _SCORED_AT_ONCE)), [])
    for scored in score([parse_completions(one) for one in chunk] for chunk in chunks):
        for found, record in zip(scored, read_again, strict=False):
            yield record | {name: found[name] for name in ("rewards", "percentiles", "reward_model")}


def _choose(options: DistillOptions, run: Path, skipped: Skipped) -> None:
    scored = list(read_records([run / "scored.jsonl"], _as_it_is))
    try:
        winners, selection = select_winners(scored, options.rules)
    except ValueError as error:
        raise OptionsError(f"min_reward: {error}") from error
    if not winners:
        counts = ", ".join(f"{name} {count}" for name, count in selection.as_record().items() if count)
        raise OptionsError(f"min_reward: no completion is good enough to learn from ({counts})")
    with replacing(run / "selection.json") as partial:
        record = selection.as_record() | {"skipped_records": skipped.count}
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_records(run / "winners.jsonl", (one.as_record() for one in winners))


def _as_it_is(record: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(record.get("completions"), list):
        raise RecordError("completions", "is missing")
    return dict(record)
