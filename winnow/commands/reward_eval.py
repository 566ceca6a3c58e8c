"""`winnow reward eval`: reads what people judged, scores it, and says how far a reward model is to be trusted."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from feedback.jsonl import Skipped
from feedback.rankings import ComparisonGroup
from feedback.records import Messages
from reward.errors import RewardError
from reward.normalisation import Normalisation
from winnow.commands.models import (
    Device,
    Dtype,
    MaxBatchTokens,
    ModelSource,
    SkipInvalid,
    TrustRemoteCode,
    load_model,
    score_with_progress,
)
from winnow.commands.reward_inputs import Inputs, Reading
from winnow.commands.reward_tables import show
from winnow.console import FAILED, CommandError, print_json, progress_console, say

if TYPE_CHECKING:
    from reward.model import RewardModel
    from training.acceptability import AcceptabilityReport
    from training.comparison import Comparison
    from training.evaluation import Outcome
    from training.kwise import KwiseReport
    from training.overoptimisation import OveroptimisationReport
    from training.reports import EvaluationReport
    from training.rewardbench import BenchmarkReport

Files = list[Path] | None


def evaluate(
    data: Annotated[Files, typer.Option(help="Files of preferences or rankings; also as plain arguments.")] = None,
    more: Annotated[Files, typer.Argument(metavar="[FILE]...", help="More of them.")] = None,
    reward_model: ModelSource = "default",
    baseline_data: Annotated[
        Files, typer.Option(help="Training files: fits bags of words on them, to compare with on the same pairs.")
    ] = None,
    pool: Annotated[
        list[str] | None,
        typer.Option(help="Sources that the pooled row counts; those the model was trained on, or else all."),
    ] = None,
    categories: bool = typer.Option(False, help="A row for each tag of the records too."),
    rewardbench: Annotated[Files, typer.Option(help="Files in RewardBench's format, version 1 or 2.")] = None,
    labelled: Annotated[
        Files, typer.Option(help="Completions labelled acceptable or not: P(acceptable), and what min_reward refuses.")
    ] = None,
    candidates: Annotated[
        Files, typer.Option(help="Several completions a prompt: what best of N is worth to a better judge.")
    ] = None,
    gold: Annotated[
        str | None, typer.Option(help="The better judge, a reward model; if not given, the rewards in the records.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another reward model, to compare with on the same pairs.")
    ] = None,
    require_better: bool = typer.Option(
        False, "--require-better", help="Exit 1 unless better than --against over all, and significantly worse nowhere."
    ),
    report: Annotated[
        Path | None,
        typer.Option(help="Folder for a page to look at (index.html), its figures as PNG, and the numbers."),
    ] = None,
    as_json: bool = typer.Option(False, "--json", help="The whole report as JSON."),
    skip_invalid: SkipInvalid = False,
    max_batch_tokens: MaxBatchTokens = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """How good a reward model is on human comparisons, with 95 % intervals, beside simple baselines.

    Example: winnow reward eval --reward-model default --data validation/*.jsonl.gz --baseline-data train/*.jsonl.gz
    """
    if require_better and against is None:
        raise CommandError("--require-better: needs --against, the reward model to be better than")
    files = [*(data or []), *(more or [])]
    if against is not None and not files:
        raise CommandError("--against: needs --data, comparisons to compare the two on")
    if not (files or rewardbench or labelled or candidates):
        raise CommandError("nothing to evaluate on: give --data, --rewardbench, --labelled or --candidates")
    _require_extra("training.reward_model", "training")
    if report is not None:
        # Known before hours of scoring, not after.
        _require_extra("training.report_page", "eval")
        if report.exists() and not report.is_dir():
            raise CommandError(f"--report {report}: is a file; name a folder")
    read = Reading(skip_invalid)
    inputs = read.inputs(files, baseline_data or [], rewardbench or [], labelled or [], candidates or [], gold is None)
    scoring = _Scoring(device, dtype, trust_remote_code, max_batch_tokens)
    found = _report(inputs, scoring, reward_model, against, gold, pool, read.skipped)
    if report is not None:
        _write_page(report, found)
    if as_json:
        print_json(found.as_json())
    else:
        show(found, with_categories=categories)
    if require_better and found.comparison is not None and not found.comparison.passes:
        raise CommandError(f"--require-better: {found.comparison.verdict}", exit_code=FAILED)


class _Scorable(Protocol):
    """Whatever holds completions of a prompt."""

    @property
    def prompt(self) -> Messages: ...

    @property
    def completions(self) -> Sequence[Messages]: ...


@dataclass(frozen=True, slots=True)
class _Scored:
    """What is left of a reward model when it has scored all there is: it need not stay in memory."""

    name: str
    normalisation: Normalisation
    trained_on: Sequence[str]
    truncated: int
    _rewards: Mapping[str, float] = field(repr=False)

    def raw(self, items: Sequence[_Scorable]) -> list[list[float]]:
        """Raw rewards of each item's completions."""
        return [[self._rewards[_key(item.prompt, c)] for c in item.completions] for item in items]

    def normalised(self, items: Sequence[_Scorable]) -> list[list[float]]:
        """Rewards as they are served."""
        return [[self.normalisation.reward(reward) for reward in rewards] for rewards in self.raw(items)]


@dataclass(frozen=True, slots=True)
class _Scoring:
    """How reward models are loaded and run."""

    device: str
    dtype: str
    trust_remote_code: bool
    max_batch_tokens: int | None

    def by(self, source: str, items: Sequence[_Scorable]) -> _Scored:
        """Every different completion once, and a prompt once for all of its own. Raises `CommandError`."""
        model: RewardModel = load_model(
            source, device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )
        completions: dict[str, dict[str, tuple[Messages, Messages]]] = {}
        for item in items:
            of_prompt = completions.setdefault(json.dumps(list(item.prompt), sort_keys=True), {})
            of_prompt.update((_key(item.prompt, one), (item.prompt, one)) for one in item.completions)
        keys = [key for of_prompt in completions.values() for key in of_prompt]
        try:
            rendered = [
                one
                for of_prompt in completions.values()
                for one in model.shared([model.renderer.render(*asked) for asked in of_prompt.values()])
            ]
            rewards = [raw.reward for raw in score_with_progress(model, rendered, self.max_batch_tokens)]
        except (RewardError, ValueError) as error:
            raise CommandError(str(error)) from error
        manifest = model.manifest
        return _Scored(
            manifest.name,
            manifest.normalisation,
            list(manifest.training.get("pairs", {})),
            sum(one.truncated for one in rendered),
            dict(zip(keys, rewards, strict=True)),
        )


def _key(prompt: Messages, completion: Messages) -> str:
    return json.dumps([list(prompt), list(completion)], sort_keys=True)


def _report(
    inputs: Inputs,
    scoring: _Scoring,
    reward_model: str,
    against: str | None,
    gold: str | None,
    pool: Sequence[str] | None,
    skipped: Skipped,
) -> EvaluationReport:
    from training.reports import EvaluationReport, pooled_sources, set_reports

    benchmark_items = [item for items in inputs.benchmarks.values() for item in items]
    everything: list[_Scorable] = [
        *inputs.groups,
        *inputs.rankings,
        *benchmark_items,
        *inputs.labelled,
        *inputs.candidates,
    ]
    scored = scoring.by(reward_model, everything)
    rankers = _rankers(inputs, scored)
    try:
        pooled = pooled_sources(list(dict.fromkeys(g.source for g in inputs.groups)), pool, scored.trained_on)
    except ValueError as error:
        raise CommandError(f"--pool {error}") from error
    return EvaluationReport(
        scored.name,
        pooled,
        set_reports(rankers, pooled) if inputs.groups else {},
        _rankings(inputs, scored),
        _benchmarks(inputs, scored),
        _acceptability(inputs, scored),
        _overoptimisation(inputs, scored, scoring, gold),
        _comparison(inputs, scored, scoring, against, rankers, pooled),
        scored.truncated,
        skipped.count,
    )


def _outcomes(groups: Sequence[ComparisonGroup], scored: _Scored) -> list[Outcome]:
    from training.evaluation import pair_outcomes

    return _by_prompt(groups, pair_outcomes(groups, [reward for rewards in scored.raw(groups) for reward in rewards]))


def _by_prompt(groups: Sequence[ComparisonGroup], outcomes: Sequence[Outcome]) -> list[Outcome]:
    """One prompt in several files or sets is still one prompt."""
    prompts: dict[str, int] = {}
    numbers = [prompts.setdefault(json.dumps(list(g.prompt), sort_keys=True), len(prompts)) for g in groups]
    return [replace(outcome, prompt=numbers[outcome.prompt]) for outcome in outcomes]


def _rankers(inputs: Inputs, scored: _Scored) -> dict[str, list[Outcome]]:
    """Outcomes of the model and of the baselines. Raises `CommandError`."""
    from training.baselines import WordsBaseline, own_words_rewards
    from training.evaluation import length_rewards, pair_outcomes
    from training.reports import LONGER, MODEL

    groups, training = inputs.groups, inputs.training
    rankers = {MODEL: _outcomes(groups, scored), LONGER: pair_outcomes(groups, length_rewards(groups))}
    if training and groups:
        try:
            with progress_console().status("Fitting baselines …"):
                own = own_words_rewards(training, groups, with_length=True)
                rankers["words, own"] = pair_outcomes(groups, own)
                on_all = WordsBaseline(with_length=True).fit(training)
                rankers["words, all"] = pair_outcomes(groups, on_all.rewards(groups))
        except ValueError as error:
            # Bags of words need words that several training completions share.
            raise CommandError(f"--baseline-data: {error}") from error
    return rankers


def _rankings(inputs: Inputs, scored: _Scored) -> dict[str, KwiseReport]:
    from training.kwise import RankingOutcome, kwise_report

    by_source: dict[str, list[RankingOutcome]] = {}
    for ranking, rewards in zip(inputs.rankings, scored.raw(inputs.rankings), strict=True):
        source = ranking.source or ""
        by_source.setdefault(source, []).append(RankingOutcome(source, tuple(ranking.ranks), tuple(rewards)))
    reports = {source: kwise_report(outcomes) for source, outcomes in by_source.items()}
    return {source: report for source, report in reports.items() if report is not None}


def _benchmarks(inputs: Inputs, scored: _Scored) -> dict[str, BenchmarkReport]:
    from training.rewardbench import benchmark_report

    try:
        return {file: benchmark_report(items, scored.raw(items)) for file, items in inputs.benchmarks.items()}
    except ValueError as error:
        raise CommandError(f"--rewardbench: {error}") from error


def _acceptability(inputs: Inputs, scored: _Scored) -> AcceptabilityReport | None:
    from training.acceptability import PERCENTILES, acceptability_report

    if not inputs.labelled:
        return None
    rewards = [reward for rewards in scored.normalised(inputs.labelled) for reward in rewards]
    try:
        # A model that does not know its references: percentiles of these completions, which min_reward cannot name.
        own = Normalisation.fit(rewards) if not scored.normalisation.quantiles else None
    except ValueError as error:
        raise CommandError(f"--labelled: {error}") from error
    thresholds = {}
    for percentile in PERCENTILES:
        at = (own or scored.normalisation).at_percentile(percentile)
        assert at is not None, "there are quantiles"
        thresholds[f"p{percentile}"] = at if own is None else at * own.std + own.mean
    try:
        return acceptability_report(rewards, [one.acceptable for one in inputs.labelled], thresholds)
    except ValueError as error:
        raise CommandError(f"--labelled: {error}") from error


def _overoptimisation(
    inputs: Inputs, scored: _Scored, scoring: _Scoring, gold: str | None
) -> OveroptimisationReport | None:
    from training.overoptimisation import Judged, overoptimisation

    if not inputs.candidates:
        return None
    proxy = scored.normalised(inputs.candidates)
    if gold is None:
        name, judged = "the records' rewards", [list(one.gold or ()) for one in inputs.candidates]
    else:
        judge = scoring.by(gold, inputs.candidates)
        name, judged = judge.name, judge.normalised(inputs.candidates)
    try:
        return overoptimisation(name, [Judged(p, g) for p, g in zip(proxy, judged, strict=True)])
    except ValueError as error:
        raise CommandError(f"--candidates: {error}") from error


def _comparison(
    inputs: Inputs,
    scored: _Scored,
    scoring: _Scoring,
    against: str | None,
    rankers: Mapping[str, Sequence[Outcome]],
    pooled: Sequence[str],
) -> Comparison | None:
    from training.comparison import compare
    from training.reports import MODEL

    if against is None:
        return None
    other = scoring.by(against, inputs.groups)
    # Two folders may carry one name: then the way they were asked for tells them apart.
    names = (scored.name, other.name if other.name != scored.name else against)
    return compare(names, rankers[MODEL], _outcomes(inputs.groups, other), pooled)


def _write_page(folder: Path, found: EvaluationReport) -> None:
    from training.report_page import write_report

    try:
        page = write_report(folder, found, datetime.now(UTC))
    except OSError as error:
        raise CommandError(f"--report {folder}: {error}") from error
    say(f"report: {page}")


def _require_extra(module: str, extra: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise CommandError(f"this needs {error.name}: install winnow[{extra}]") from error
