"""Rules that make one reward of several, by hand and as promised."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from feedback.records import Message, Messages
from reward.ensembles import aggregate
from reward.loading import HEAD_FILE
from reward.local import LocalScorer
from reward.manifest import Aggregate, Head, Manifest
from reward.network import build_head
from reward.normalisation import Normalisation
from reward.scorer import Score
from tests.fakes.models import build_tiny_causal_lm

RULES: tuple[Aggregate, ...] = get_args(Aggregate)
ROWS = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("mean", [3.0, 1.0]), ("worst", [1.0, 1.0]), ("mean_less_std", [3.0 - 2.0 * math.sqrt(8 / 3), 1.0])],
)
def test_rules_by_hand(rule: Aggregate, expected: list[float]) -> None:
    rewards = torch.tensor([[1.0, 3.0, 5.0], [1.0, 1.0, 1.0]])
    assert aggregate(rewards, rule, 2.0).tolist() == pytest.approx(expected)


@given(ROWS, st.sampled_from(RULES), st.floats(0, 3))
def test_disagreement_never_raises_a_reward(row: list[float], rule: Aggregate, coefficient: float) -> None:
    found = aggregate(torch.tensor([row]), rule, coefficient).item()
    assert found <= max(row) + 1e-4
    assert found <= aggregate(torch.tensor([row]), "mean", coefficient).item() + 1e-4


async def scores_under(folder: Path, rule: Aggregate | None) -> list[Score]:
    """Of three answers."""
    prompt: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]
    answers: list[Messages] = [[{"role": "assistant", "content": text}] for text in ("Paris.", "Rome", "I see, a list")]
    scorer = LocalScorer(str(folder), device="cpu", aggregate=rule)
    try:
        await scorer.start()
        return await scorer.score(prompt, answers)
    finally:
        await scorer.aclose()


async def test_a_scorer_serves_the_rule_it_is_given(tmp_path: Path) -> None:
    head = Head("pooled", ("last", "mean"), heads=4, aggregate="mean")
    torch.manual_seed(3)
    base = build_tiny_causal_lm(tmp_path / "base")
    scales = {rule: Normalisation(mean=1.0 + number) for number, rule in enumerate(RULES)}
    save_file(build_head(32, head).state_dict(), tmp_path / HEAD_FILE)
    Manifest("tiny", str(base), head, "chat", 64, normalisation=scales["mean"], scales=scales).save(tmp_path)
    own = await scores_under(tmp_path, None)
    found = {rule: await scores_under(tmp_path, rule) for rule in RULES}
    assert found["mean"] == own
    for number, rule in enumerate(RULES):
        for score in found[rule]:
            assert score.reward == pytest.approx(score.raw_reward - (1.0 + number))
    for worst, mean in zip(found["worst"], own, strict=True):
        assert worst.raw_reward < mean.raw_reward


async def test_a_score_says_how_far_the_heads_disagree(tmp_path: Path) -> None:
    head = Head("pooled", heads=3, aggregate="mean_less_std", std_coefficient=2.0)
    base = build_tiny_causal_lm(tmp_path / "base")
    torch.manual_seed(4)
    save_file(build_head(32, head).state_dict(), tmp_path / HEAD_FILE)
    scales = {rule: Normalisation(std=4.0) for rule in RULES}
    Manifest("tiny", str(base), head, "chat", 64, normalisation=Normalisation(std=4.0), scales=scales).save(tmp_path)
    mean, cautious = await scores_under(tmp_path, "mean"), await scores_under(tmp_path, None)
    for one, other in zip(mean, cautious, strict=True):
        assert one.std is not None and one.std > 0
        assert other.std == pytest.approx(one.std)
        # On the scale of rewards: what the rule takes off.
        assert one.reward - other.reward == pytest.approx(2.0 * one.std, abs=1e-5)


async def test_a_single_head_does_not_disagree_with_itself(tmp_path: Path) -> None:
    base = build_tiny_causal_lm(tmp_path / "base")
    head = Head("pooled")
    save_file(build_head(32, head).state_dict(), tmp_path / HEAD_FILE)
    Manifest("tiny", str(base), head, "chat", 64).save(tmp_path)
    assert [score.by_heads() for score in await scores_under(tmp_path, None)] == [{}, {}, {}]
