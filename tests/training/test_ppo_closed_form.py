"""PPO converges to the optimum that is known in closed form; and does not, with any of these mistakes in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training import closed_form
from training import ppo_update
from training.advantages import token_rewards
from training.kl import k1, k3

REWARD_ERROR = 0.01
KL_RATIO = 0.05
"""How far off a run may end: in score, and in KL as a share of the optimum's."""


def is_at_the_optimum(found: closed_form.Optimum, wanted: closed_form.Optimum) -> bool:
    return abs(found.reward - wanted.reward) <= REWARD_ERROR and abs(found.kl / wanted.kl - 1) <= KL_RATIO


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_score_and_kl_are_those_of_the_closed_form(seed: int, beta: float) -> None:
    found, wanted = closed_form.learn(beta, seed)
    assert is_at_the_optimum(found, wanted), f"{found}, closed form {wanted}"


def score_on_the_first_token(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    rewards = token_rewards(torch.zeros_like(scores), kl, mask, kl_coef)
    rewards[:, 0] += scores
    return rewards


def score_on_every_token(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    return token_rewards(torch.zeros_like(scores), kl, mask, kl_coef) + scores.unsqueeze(1)


def batch_normalised_score(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    return token_rewards((scores - scores.mean()) / scores.std(), kl, mask, kl_coef)


def opposite_advantages(*arguments: Any) -> Any:
    found = GENERALISED(*arguments)
    return replace(found, advantages=-found.advantages)


GENERALISED = ppo_update.generalised_advantages

DEFECTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "KL clamped at 0": ("k1", lambda ours, reference: k1(ours, reference).clamp(min=0)),
    "k3 as the penalty": ("k1", k3),
    "KL of the wrong sign": ("k1", lambda ours, reference: k1(reference, ours)),
    "KL averaged over the length": ("k1", lambda ours, reference: k1(ours, reference) / closed_form.NUM_TOKENS),
    "no KL": ("k1", lambda ours, reference: torch.zeros_like(ours)),
    "score on the first token": ("token_rewards", score_on_the_first_token),
    "score on every token": ("token_rewards", score_on_every_token),
    "score normalised by the batch": ("token_rewards", batch_normalised_score),
    "advantages of the wrong sign": ("generalised_advantages", opposite_advantages),
    "gamma 0.9": ("generalised_advantages", lambda r, v, m, gamma, lam: GENERALISED(r, v, m, 0.9, lam)),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_mistake_ends_elsewhere(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = DEFECTS[defect]
    monkeypatch.setattr(ppo_update, name, wrong)
    found, wanted = closed_form.learn(0.1, seed=0, num_iterations=40)
    assert not is_at_the_optimum(found, wanted)
    assert abs(found.reward - wanted.reward) > 3 * REWARD_ERROR, "far off, not just short of it"


def test_so_few_iterations_would_do_without_a_mistake() -> None:
    """Else the runs above would end elsewhere for lack of time."""
    found, wanted = closed_form.learn(0.1, seed=0, num_iterations=40)
    assert abs(found.reward - wanted.reward) <= 2 * REWARD_ERROR
    assert abs(found.kl / wanted.kl - 1) <= 3 * KL_RATIO
