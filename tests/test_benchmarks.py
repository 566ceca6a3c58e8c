"""The gateway's benchmark still runs, whatever it measures: a benchmark that nobody runs is the first code to rot."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import bars, encoders, gateway, gateway_memory, ppo_frontier, ranking, run, scoring, trainers, waiting
from benchmarks.frontier import Point, frontier, measure, reward_at
from tests.fakes.models import build_tiny_reward_model


def test_the_gateway_benchmark_runs_and_checks_its_answers() -> None:
    *tables, held = gateway.run(rounds=1, share=0.01, with_peers=False)
    assert len(tables) == 9
    assert len(held.rows) == 7
    for table in tables:
        names = [str(row[0]) for row in table.rows]
        assert any(name.startswith("floor") for name in names)
        assert any(name.startswith("winnow") for name in names)
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_the_memory_benchmark_runs() -> None:
    sizes, held = gateway_memory.run(requests=100)
    assert all(isinstance(row[1], float) and row[1] > 10 for row in sizes.rows)
    assert len(held.rows) == 1


def test_a_bar_says_whether_it_holds() -> None:
    rows = bars.table([
        bars.Bar("cost", 2, 1.5),
        bars.Bar("cost", 2, 2.5),
        bars.Bar("rate", 50, 51, " a second", at_least=True),
        bars.Bar("rate", 50, 49, " a second", at_least=True),
        bars.Bar("cost", 2, None),
    ]).rows  # fmt: skip
    assert [row[-1] for row in rows] == ["yes", "NO", "yes", "NO", "NO"]
    assert rows[2][1] == "≥ 50 a second"


def test_scoring_is_compared_with_transformers_on_the_same_texts_and_rewards_agree() -> None:
    table, held = scoring.run(scoring.Grid((48,), (2,)), (4, 8), layers=1, rounds=1)
    ((prompt, n, *figures, share, difference),) = table.rows
    assert (prompt, n) == (48, 2)
    pipeline, by_hand, ours, to_pipeline, to_by_hand, ideal = (float(str(figure)) for figure in figures)
    assert to_pipeline == pytest.approx(ours / pipeline)
    assert to_by_hand == pytest.approx(ours / by_hand)
    assert 1.6 < ideal < 2
    assert str(share).endswith("%")
    assert float(str(difference)) <= 1e-4
    # No prompt is long enough for the first two bars; the third is what it is.
    assert [row[2] for row in held.rows] == [None, None, to_by_hand]


def test_the_share_of_the_ideal_is_measured_against_the_faster_peer() -> None:
    rounds = [scoring.Timed(pipeline=4.0, by_hand=6.0, ours=2.0, ideal=2.5, difference=0.0)]
    cell = scoring.Cell(256, 4, rounds)
    assert (cell.to_pipeline, cell.to_by_hand, cell.share_by_hand, cell.share) == (2.0, 3.0, 1.2, 0.8)


def test_callers_of_an_encoder_differ_and_come_again() -> None:
    asked = encoders.requests(5, 3, seed=3)
    assert [len(pairs) for pairs in asked] == [3] * 5
    assert all(len({prompt for prompt, _ in pairs}) == 1 for pairs in asked)
    assert asked == encoders.requests(5, 3, seed=3) != encoders.requests(5, 3, seed=4)


def test_what_is_left_to_wait_for_is_measured(tmp_path: Path) -> None:
    folder = build_tiny_reward_model(tmp_path / "tiny")
    shapes = [waiting.Shape(70, 2, gap_s, 8, first_s=0.0) for gap_s in (0.0, 0.001)]
    (table,) = waiting.run(shapes, rounds=1, source=str(folder))
    assert [row[:3] for row in table.rows] == [[70, 2, "at once"], [70, 2, "one in 0.001 s"]]
    assert all(isinstance(figure, float) and figure > 0 for row in table.rows for figure in row[3:])


def test_rankings_cost_the_same_loss_by_every_way() -> None:
    (table,) = ranking.run(layers=1, rounds=1, shapes=[(16, 8, 3)])
    assert [str(row[0]).rpartition(": ")[2] for row in table.rows] == ["all pairs", "each completion once", "packed"]
    assert all(float(str(row[3])) < 1e-5 for row in table.rows)


def test_rankings_for_both_trainers_have_one_order_and_all_their_pairs() -> None:
    data = trainers.ruled(5, 6, rankings_to_measure=2)
    assert (len(data.train), len(data.validation), data.steps) == (6, 2, 1)
    for record in data.train:
        lengths = [len(completion[0]["content"].split()) for completion in record["completions"]]
        assert [sorted(lengths).index(length) + 1 for length in lengths] == record["ranks"]
    pairs = trainers.pairs(data.train)
    assert len(pairs) == 6 * 10
    for pair in pairs:
        assert len(pair["chosen"][-1]["content"].split()) < len(pair["rejected"][-1]["content"].split())
        assert pair["chosen"][:-1] == pair["rejected"][:-1]


def test_the_frontier_is_the_best_of_policies_and_straight_over_the_root_of_kl() -> None:
    under, dominated = Point(2.25, 0.4), Point(5.0, 0.45)
    hull = frontier([Point(4.0, 0.48), dominated, Point(0.0, 0.3), under, Point(1.0, 0.4)])
    assert hull == [Point(0.0, 0.3), Point(1.0, 0.4), Point(4.0, 0.48)]
    assert [reward_at(hull, kl) for kl in (0.0, 0.25, 2.25, 4.0)] == pytest.approx([0.3, 0.35, 0.44, 0.48])
    assert reward_at(hull, 9.0) is None


def test_policies_are_compared_at_the_kl_of_the_others_frontier() -> None:
    reached = [
        ppo_frontier.Reached(side, 1e-4, samples, 1.0, Point(kl, reward))
        for side, samples, kl, reward in (("trl", 64, 1.0, 0.45), ("trl", 128, 2.0, 0.5), ("winnow", 128, 2.0, 0.47))
    ]
    points, compared, turned, held = ppo_frontier.tables("trl", Point(0.0, 0.3), reached)
    assert len(points.rows) == 4
    assert [row[-1] for row in compared.rows] == pytest.approx([0.3 + 0.17 / math.sqrt(2), 0.47])
    assert turned.rows == [["winnow", 2.0, 0.47, 0.5]]
    ((_, _, worst, holds),) = held.rows
    assert worst == pytest.approx(-0.03)
    assert holds == "NO"


def test_a_policy_is_measured_from_the_one_at_the_start(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = AutoModelForCausalLM.from_pretrained(ppo_frontier.start_model(tmp_path), dtype=torch.float32).eval()
    prompts = torch.randint(ppo_frontier.VOCABULARY, (6, 4))

    def score(completions: Sequence[Sequence[int]]) -> list[float]:
        return [completion[0] / ppo_frontier.VOCABULARY for completion in completions]

    same = measure(start, start, prompts, 3, score)
    assert same.kl == 0
    assert measure(start, start, prompts, 3, score) == same
    other = copy.deepcopy(start)
    with torch.no_grad():
        other.lm_head.weight.zero_()
        logprobs = start(prompts).logits[:, -1].double().log_softmax(dim=-1)
    uniform = measure(other, start, prompts, 1, score)
    assert uniform.kl == pytest.approx(float(-math.log(ppo_frontier.VOCABULARY) - logprobs.mean()), rel=1e-4)


def test_the_hardware_is_named() -> None:
    assert "Python 3" in run.hardware()


def test_no_benchmark_hides_a_room() -> None:
    """`python benchmarks/run.py` looks beside itself first."""
    ours = {path.stem for path in Path(run.__file__).parent.glob("*.py")}
    assert not ours & {"winnow", "proxy", "reward", "training", "feedback"}
