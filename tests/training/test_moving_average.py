"""Averaged weights."""

from __future__ import annotations

import pytest
import torch

from training.moving_average import WeightAverage


def test_p18_recursion_on_a_scalar() -> None:
    average = WeightAverage({"w": torch.tensor(1.0)}, decay=0.992)
    expected = 1.0
    for step in range(1, 6):
        average.update({"w": torch.tensor(float(step))})
        expected = 0.992 * expected + 0.008 * step
    assert average.weights["w"].item() == pytest.approx(expected, rel=1e-6)


def test_p18_the_average_is_not_the_weight_itself() -> None:
    weight = torch.tensor([1.0])
    average = WeightAverage({"w": weight}, decay=0.5)
    weight.fill_(5.0)
    assert average.weights["w"].item() == 1.0
    average.update({"w": weight})
    assert average.weights["w"].item() == 3.0


def test_other_weights_are_refused() -> None:
    average = WeightAverage({"w": torch.tensor(1.0)}, decay=0.9)
    with pytest.raises(KeyError, match="other weights"):
        average.update({"v": torch.tensor(1.0)})
