"""A loop's story as a page to look at: one HTML file that asks nothing of the network."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from matplotlib.figure import Figure

from feedback.jsonl import replacing
from training.figures import GREY, INK, OTHER, OWN, as_svg, finish, plain, rows
from training.page import render
from training.rlhf_story import FineTuning, PpoStory, RoundStory, Story

_SEED_COLOURS = (OWN, OTHER, "#059669", "#7c3aed", "#db2777", GREY)


def write_rlhf_report(path: Path, story: Story) -> None:
    """Writes the page; it appears only when whole."""
    drawn = {}
    if story.fine_tuning is not None:
        drawn["sft"] = as_svg(fine_tuning_figure(story.fine_tuning))
    for one in story.rounds:
        drawn[f"ppo-{one.number}"] = as_svg(ppo_figure(one.ppo))
    if story.rounds:
        drawn["wins"] = as_svg(wins_figure(story.rounds))
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    with replacing(path) as partial:
        partial.write_text(render("rlhf_page.html.jinja", drawn, story=story, made=made), encoding="utf-8")


def fine_tuning_figure(found: FineTuning) -> Figure:
    """Loss on held-out demonstrations by step."""
    figure, axes = plain(7.2, 2.6)
    axes.plot([step for step, _ in found.curve], [loss for _, loss in found.curve], "o-", color=OWN, lw=2, ms=5)
    axes.set_ylabel("nats a token")
    axes.locator_params("x", integer=True)
    finish(axes, "step")
    return figure


def ppo_figure(runs: Sequence[PpoStory]) -> Figure:
    """Left: held-out score by iteration, and each batch's beneath it. Right: what the score cost in KL."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    over_time, over_kl = figure.subplots(1, 2, sharey=True)
    for place, run in enumerate(runs):
        colour = _SEED_COLOURS[place % len(_SEED_COLOURS)]
        over_time.plot([n for n, _, _ in run.training], [s for _, s, _ in run.training], color=colour, lw=1, alpha=0.35)
        over_time.plot(
            [point.iteration for point in run.curve],
            [point.score for point in run.curve],
            "o-",
            color=colour,
            lw=2,
            ms=5,
            label=f"seed {run.seed}",
        )
        over_kl.plot([point.kl for point in run.curve], [point.score for point in run.curve], "o-", color=colour, ms=5)
    over_time.set_ylabel("reward, deviations")
    over_time.locator_params("x", integer=True)
    finish(over_kl, "exact KL from the start, nats a completion")
    finish(over_time, "iteration; thin lines: the batches it learnt from")
    return figure


def wins_figure(rounds: Sequence[RoundStory]) -> Figure:
    """Each round's policy against the one before: win rate with its interval, and the same at equal length."""
    figure, axes = rows([f"round {one.number}" for one in rounds])
    for place, one in enumerate(rounds):
        plainly, evenly = one.comparison["win_rate"], one.comparison["length_controlled"]["win_rate"]
        axes.plot([plainly["low"] * 100, plainly["high"] * 100], [place, place], color=OWN, lw=5, alpha=0.3)
        axes.plot(plainly["value"] * 100, place, "o", color=OWN, ms=8, label="win rate" if not place else None)
        label = "at equal length" if not place else None
        axes.plot(evenly["value"] * 100, place, "D", mfc="white", mec=OTHER, mew=1.6, ms=6, label=label)
    axes.axvline(50, color=INK, lw=1)
    finish(axes, "won against the policy before, %")
    return figure
