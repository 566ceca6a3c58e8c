"""PPO's losses and its update, by hand and by their promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from training.losses import clipped_policy_loss, clipped_value_loss
from training.ppo_update import (
    Evaluation,
    Experience,
    GradNorms,
    LossOf,
    Rollout,
    UpdateOptions,
    build_experience,
    minibatches,
    update,
)

ONE = torch.ones(1, 1, dtype=torch.bool)


def cell(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("advantage", "ratio", "learns"),
    [
        (1.0, 1.5, False),  # already likelier than asked for: no more of it
        (1.0, 0.5, True),  # less likely though it is good: the whole pull back
        (-1.0, 0.5, False),  # already rarer than asked for
        (-1.0, 1.5, True),
        (1.0, 1.1, True),
        (-1.0, 0.9, True),
    ],
)
def test_p12_the_gradient_is_zero_iff_clipped_on_the_harmful_side(advantage: float, ratio: float, learns: bool) -> None:
    logprobs = cell(ratio).log().requires_grad_()
    loss = clipped_policy_loss(logprobs, cell(1.0).log(), cell(advantage), ONE, 0.2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(-advantage * ratio if learns else 0.0)
    bounded = min(max(ratio, 0.8), 1.2)
    assert loss.item() == pytest.approx(max(-advantage * ratio, -advantage * bounded))


def test_p12_values_are_clipped_around_old_values() -> None:
    values = torch.tensor([[2.0, 0.6, -1.0]], requires_grad=True)
    old, returns = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[3.0, 1.0, 0.0]])
    loss = clipped_value_loss(values, old, returns, torch.ones(1, 3, dtype=torch.bool), 0.2)
    # (0.7 − 3)² beats (2 − 3)²; 0.6 lies within; (−1)² beats (−0.2)².
    assert loss.item() == pytest.approx(0.5 * (5.29 + 0.16 + 1.0))
    loss.backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.tolist() == [pytest.approx([0.0, -0.4, -1.0])]
    plain = clipped_value_loss(values, old, returns, torch.ones(1, 3, dtype=torch.bool), None)
    assert plain.item() == pytest.approx(0.5 * (1.0 + 0.16 + 1.0))


def test_p9_losses_do_not_read_behind_a_completion() -> None:
    mask = torch.tensor([[True, False]])
    logprobs = torch.tensor([[-1.0, torch.nan]], requires_grad=True)
    values = torch.tensor([[1.0, torch.nan]], requires_grad=True)
    nan = torch.tensor([[0.0, torch.nan]])
    loss = clipped_policy_loss(logprobs, nan, nan + 1, mask, 0.2) + clipped_value_loss(values, nan, nan, mask, 0.2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    for one in (logprobs, values):
        assert one.grad is not None
        assert torch.isfinite(one.grad).all()
        assert one.grad[0, 1] == 0


class Table:
    """A learner whose log-probabilities and values are free numbers."""

    def __init__(self, experience: Experience, micro_size: int = 100, rate: float = 0.1) -> None:
        self.logprobs = experience.old_logprobs.double().clone().requires_grad_()
        self.values = experience.old_values.double().clone().requires_grad_()
        self.micro_size = micro_size
        self.rate = rate
        self.steps = 0
        self.gradients: list[Tensor] = []

    def accumulate(self, rows: Tensor, loss_of: LossOf) -> None:
        for own in rows.split(self.micro_size):
            loss_of(Evaluation(self.logprobs[own], self.values[own]), own).backward()  # type: ignore[no-untyped-call]

    def step(self) -> GradNorms:
        self.steps += 1
        found = []
        for weights in (self.logprobs, self.values):
            assert weights.grad is not None
            self.gradients.append(weights.grad.clone())
            found.append(float(weights.grad.norm()))
            with torch.no_grad():
                weights -= self.rate * weights.grad
            weights.grad = None
        return GradNorms(*found)

    def reduce(self, totals: Tensor) -> Tensor:
        return totals


def example(seed: int = 0, **more: Any) -> tuple[Experience, UpdateOptions]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 1, 5, 2])[:, None]

    def numbers() -> Tensor:
        return torch.randn(mask.shape, generator=generator, dtype=torch.float64)

    scores = torch.randn(len(mask), generator=generator, dtype=torch.float64)
    options = UpdateOptions(**more)
    rollout = Rollout(scores, mask, -numbers().abs(), -numbers().abs(), numbers())
    return build_experience(rollout, options, 0.1), options


def orders(options: UpdateOptions, size: int = 8) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randperm(size, generator=generator).tolist() for _ in range(options.ppo_epochs)]


def test_p3_the_ratio_is_one_before_the_first_step() -> None:
    experience, options = example(ppo_epochs=2)
    found = update(Table(experience), experience, options, orders(options))
    assert found.first_ratio_error == 0.0
    assert found.ratio != 1.0


def test_p3_what_sampling_and_training_disagree_about_is_reported() -> None:
    experience, options = example(ppo_epochs=1)
    shifted = replace(experience, old_logprobs=experience.old_logprobs - 0.1)
    found = update(Table(experience), shifted, options, orders(options))
    assert found.first_ratio_error == pytest.approx(torch.tensor(0.1).exp().item() - 1, rel=1e-4)


@pytest.mark.parametrize("micro_size", [100, 1])
@pytest.mark.parametrize(("epochs", "parts", "steps"), [(1, 1, 1), (4, 1, 4), (1, 8, 8), (3, 2, 6)])
def test_p13_minibatches_change_the_number_of_steps_and_accumulation_does_not(
    epochs: int, parts: int, steps: int, micro_size: int
) -> None:
    experience, options = example(ppo_epochs=epochs, num_minibatches=parts)
    table = Table(experience, micro_size)
    assert update(table, experience, options, orders(options)).steps == table.steps == steps


def test_p13_every_completion_is_seen_once_an_epoch() -> None:
    options = UpdateOptions(ppo_epochs=3, num_minibatches=4)
    seen = [rows.tolist() for rows in minibatches(8, options, orders(options))]
    assert [len(rows) for rows in seen] == [2] * 12
    for epoch in range(3):
        rows = [row for part in seen[4 * epoch : 4 * epoch + 4] for row in part]
        assert sorted(rows) == list(range(8))


def test_p14_micro_batches_of_ragged_lengths_give_the_same_gradient() -> None:
    experience, options = example(ppo_epochs=2, num_minibatches=2)
    whole, single = Table(experience), Table(experience, micro_size=1)
    metrics = [update(table, experience, options, orders(options)) for table in (whole, single)]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(whole.gradients, single.gradients, strict=True))
    assert metrics[0].policy_loss == pytest.approx(metrics[1].policy_loss)
    assert metrics[0].clip_fraction == metrics[1].clip_fraction


def test_p11_advantages_are_whitened_over_the_whole_batch() -> None:
    experience, _ = example()
    kept = experience.advantages[experience.completion_mask]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-6)
    assert float(kept.square().mean()) == pytest.approx(1, abs=1e-5)
    raw, _ = example(whiten_advantages=False)
    assert float(raw.advantages[experience.completion_mask].square().mean()) != pytest.approx(1, abs=0.1)
    assert torch.equal(experience.returns, raw.returns), "P10: returns do not see the whitening"


def test_the_metrics_of_an_update_by_hand() -> None:
    mask = torch.tensor([[True, True]])
    experience = Experience(
        mask, torch.tensor([[-1.0, -1.0]]), torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2), 0, 0, 1
    )
    table = Table(replace(experience, old_logprobs=torch.tensor([[-0.5, -1.0]]), old_values=torch.full((1, 2), 0.5)))
    found = update(table, experience, UpdateOptions(ppo_epochs=1), [[0]])
    ratio = torch.tensor(0.5).exp().item()
    assert found.clip_fraction == 0.5
    assert found.value_clip_fraction == 1.0
    assert found.policy_loss == pytest.approx((-1.2 + 1) / 2)
    assert found.value_loss == pytest.approx(0.5 * 0.8**2)
    assert found.ratio == pytest.approx((ratio + 1) / 2)
    assert found.update_kl == pytest.approx((ratio - 1 - 0.5) / 2, rel=1e-5)
