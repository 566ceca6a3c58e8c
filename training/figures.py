"""Figures of an evaluation, and what all figures share; drawn with matplotlib's objects: no window, no global state.

Each function takes a part of the report and gives a figure; `as_png` and `as_svg` turn it into bytes.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.acceptability import AcceptabilityReport, AcceptanceMap
from training.comparison import Comparison
from training.overoptimisation import OveroptimisationReport
from training.reports import LONGER, EvaluationReport, SetReport
from training.rewardbench import BenchmarkReport

INK, GREY, LIGHT = "#1f2933", "#7b8794", "#e4e7eb"
OWN, OTHER, WARM = "#2563eb", "#d97706", "#dc2626"
"""The model, what it is held against, what should alarm."""
_WIDTH = 7.2
_LONGEST_NAME = 30


def figures(report: EvaluationReport) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of everything in the report that can be drawn."""
    if report.pooled is not None:
        yield "accuracy", accuracy_figure(report.sets)
        yield "calibration", calibration_figure(report.pooled)
        yield "length", length_figure(report.sets)
    if report.comparison is not None:
        yield "comparison", comparison_figure(report.comparison)
    for place, benchmark in enumerate(report.rewardbench.values(), start=1):
        yield f"rewardbench-{place}", benchmark_figure(benchmark)
    if report.acceptability is not None:
        yield "acceptability", acceptability_figure(report.acceptability)
    if report.overoptimisation is not None:
        yield "overoptimisation", overoptimisation_figure(report.overoptimisation)


def as_png(figure: Figure) -> bytes:
    """At twice the screen's resolution."""
    return _saved(figure, "png", dpi=160)


def as_svg(figure: Figure) -> bytes:
    """Text as outlines: it looks the same everywhere and needs no font."""
    return _saved(figure, "svg", metadata={"Date": None, "Creator": None})


def accuracy_figure(sets: Mapping[str, SetReport]) -> Figure:
    """Every set's accuracy with its interval by prompt, beside "the longer one wins"."""
    figure, axes = rows(list(sets))
    for place, row in enumerate(sets.values()):
        axes.plot([row.low_by_prompt * 100, row.high_by_prompt * 100], [place, place], color=OWN, lw=5, alpha=0.3)
        axes.plot(row.accuracy * 100, place, "o", color=OWN, ms=8, label="this model" if not place else None)
        longer = row.baselines[LONGER].accuracy * 100
        axes.plot(longer, place, "D", mfc="white", mec=OTHER, mew=1.6, ms=6, label="longer wins" if not place else None)
    axes.axvline(50, color=GREY, ls=":", lw=1)
    finish(axes, "pairs in the people's order, %")
    return figure


def calibration_figure(row: SetReport) -> Figure:
    """How sure the model is of its choice against how often people made the same; circles as large as their bins."""
    figure, axes = plain(4.6, 4.2)
    axes.plot([50, 100], [50, 100], color=GREY, ls=":", lw=1, label="as sure as right")
    confidence = [one.confidence * 100 for one in row.calibration_bins]
    accuracy = [one.accuracy * 100 for one in row.calibration_bins]
    sizes = [30 + 400 * one.pairs / row.pairs for one in row.calibration_bins]
    axes.plot(confidence, accuracy, color=OWN, lw=1.5)
    axes.scatter(confidence, accuracy, sizes, color=OWN, alpha=0.75, label="this model")
    axes.set_ylabel("right, %")
    axes.set_ylim(min([45.0, *(a - 5 for a in accuracy)]), 103)
    finish(axes, "confidence σ(gap), %")
    return figure


def length_figure(sets: Mapping[str, SetReport]) -> Figure:
    """Accuracy where length helps, where it misleads, and where it is no clue."""
    figure, axes = rows(list(sets))
    for place, row in enumerate(sets.values()):
        bias = row.length_bias
        points = (
            ("better is longer", bias.accuracy_when_better_is_longer, OTHER, "o"),
            ("similar length", bias.accuracy_similar_length, INK, "s"),
            ("better is shorter", bias.accuracy_when_better_is_shorter, OWN, "o"),
        )
        known = [value * 100 for _, value, _, _ in points if not math.isnan(value)]
        if known:
            axes.plot([min(known), max(known)], [place, place], color=LIGHT, lw=4, zorder=0)
        for label, value, colour, marker in points:
            if not math.isnan(value):
                axes.plot(value * 100, place, marker, color=colour, ms=7)
            if not place:
                axes.plot([], [], marker, color=colour, label=label)
    axes.axvline(50, color=GREY, ls=":", lw=1)
    finish(axes, "pairs in the people's order, %")
    return figure


def comparison_figure(found: Comparison) -> Figure:
    """Differences in points with their intervals; right of 0 the first model is better."""
    figure, axes = rows(list(found.sets))
    for place, one in enumerate(found.sets.values()):
        colour = WARM if one.high < 0 else OWN if one.low > 0 else GREY
        axes.plot([one.low * 100, one.high * 100], [place, place], color=colour, lw=5, alpha=0.35)
        axes.plot(one.difference * 100, place, "o", color=colour, ms=8)
    axes.axvline(0, color=INK, lw=1)
    finish(axes, "points more accurate than the other model")
    return figure


def benchmark_figure(found: BenchmarkReport) -> Figure:
    """Each section's score as a bar, with chance marked."""
    figure, axes = rows(list(found.sections))
    for place, section in enumerate(found.sections.values()):
        axes.barh(place, section.score * 100, color=OWN, height=0.55)
        if section.low is not None and section.high is not None:
            axes.plot([section.low * 100, section.high * 100], [place, place], color=INK, lw=1.5)
        if section.chance is not None:
            axes.plot([section.chance * 100] * 2, [place - 0.4, place + 0.4], color=WARM, lw=1.5)
    axes.plot([], [], color=WARM, lw=1.5, label="chance")
    axes.set_xlim(0, 100)
    finish(axes, "score, %")
    return figure


def acceptability_figure(found: AcceptabilityReport) -> Figure:
    """The fitted probability over rewards, what was seen, and where the thresholds lie."""
    figure, axes = plain(_WIDTH, 3.8)
    fitted = AcceptanceMap(found.slope, found.intercept)
    rewards = [one.reward for one in found.bins] + [one.reward for one in found.thresholds]
    low, high = min(rewards) - 0.3, max(rewards) + 0.3
    grid = [low + (high - low) * i / 100 for i in range(101)]
    axes.plot(grid, [fitted.probability(r) * 100 for r in grid], color=OWN, lw=2, label="fitted")
    axes.plot(
        [one.reward for one in found.bins],
        [one.accepted * 100 for one in found.bins],
        "o",
        color=OWN,
        alpha=0.6,
        ms=7,
        label="labelled, by tenths",
    )
    axes.axhline(found.acceptable * 100, color=GREY, ls=":", lw=1, label="all of them")
    for one in found.thresholds:
        axes.axvline(one.reward, color=OTHER, lw=1, alpha=0.7)
        axes.annotate(one.name, (one.reward, 2), color=OTHER, fontsize=8, rotation=90, ha="right", va="bottom")
    axes.set_ylim(0, 103)
    axes.set_ylabel("acceptable, %")
    finish(axes, "reward")
    return figure


def overoptimisation_figure(found: OveroptimisationReport) -> Figure:
    """Gains against KL, as Gao et al. draw them; n along the top."""
    figure, axes = plain(_WIDTH, 4.4)
    kl = [point.kl for point in found.points]
    axes.fill_between(
        kl, [p.gold_low for p in found.points], [p.gold_high for p in found.points], color=OWN, alpha=0.18, lw=0
    )
    axes.plot(kl, [p.gold_gain for p in found.points], "o-", color=OWN, lw=2, ms=5, label="gold gain: what n buys")
    axes.plot(kl, [p.proxy_gain for p in found.points], "--", color=OTHER, lw=1.5, label="own gain: what it believes")
    axes.plot(kl, [p.oracle_gain for p in found.points], ":", color=GREY, lw=1.5, label="the gold model's own choice")
    chosen = next(point for point in found.points if point.n == found.recommended_n)
    axes.axvline(chosen.kl, color=INK, lw=1)
    axes.annotate(
        f"best_of {chosen.n}", (chosen.kl, 0), (4, 4), textcoords="offset points", fontsize=9, color=INK, weight="bold"
    )
    top = axes.secondary_xaxis("top")
    top.set_xticks(kl, [str(point.n) for point in found.points], fontsize=8, color=GREY)
    top.tick_params(length=0)
    top.spines["top"].set_visible(False)
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set_ylabel("gain, deviations")
    finish(axes, "KL(best of n from the model), nats")
    return figure


def plain(width: float, height: float) -> tuple[Figure, Axes]:
    """One empty plot, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def rows(names: Sequence[str]) -> tuple[Figure, Axes]:
    """A row for each name, the first on top."""
    figure, axes = plain(_WIDTH, 1.5 + 0.34 * len(names))
    axes.set_yticks(range(len(names)), [_label(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    return figure, axes


def _label(name: str) -> str:
    """Short, and a dollar sign is a dollar sign, not the beginning of a formula."""
    short = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    return short.replace("$", r"\$")


def finish(axes: Axes, xlabel: str) -> None:
    """The looks that all plots share, and a legend where something has a label."""
    axes.set_xlabel(xlabel, color=INK)
    axes.grid(axis="both", color=LIGHT, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=INK, labelsize=9)
    for side in axes.spines.values():
        side.set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=9)


def _saved(figure: Figure, kind: Literal["png", "svg"], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Names in scripts that the font lacks come out as boxes; the tables beside the figures have them right.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()
