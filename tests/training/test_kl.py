"""KL estimators against the exact sum, and the controllers against tables worked by hand."""

from __future__ import annotations

import pytest
import torch

from training.kl import AdaptiveKL, FixedKL, entropy_of, exact_kl, k1, k3


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    return logits[0].log_softmax(-1), logits[1].log_softmax(-1)


def test_p6_k1_and_k3_average_to_the_exact_kl() -> None:
    """Under the policy's own distribution; each token weighted by its probability, so without chance."""
    policy, reference = distributions()
    exact = exact_kl(policy, reference)
    assert float(exact) == pytest.approx(float((policy.exp() * (policy / 1 - reference)).sum()))
    assert float((policy.exp() * k1(policy, reference)).sum()) == pytest.approx(float(exact))
    assert float((policy.exp() * k3(policy, reference)).sum()) == pytest.approx(float(exact))


def test_p6_k1_has_either_sign_and_k3_none() -> None:
    policy, reference = distributions()
    assert (k1(policy, reference) < 0).any()
    assert (k3(policy, reference) >= 0).all()
    assert k1(torch.tensor(-1.0), torch.tensor(-3.0)).item() == 2.0
    # e^−2 − 1 + 2
    assert k3(torch.tensor(-1.0), torch.tensor(-3.0)).item() == pytest.approx(1.1353352832366128)


def test_exact_kl_and_entropy_of_impossible_tokens() -> None:
    policy = torch.tensor([0.5, 0.5, 0.0]).log()
    reference = torch.tensor([0.25, 0.75, 0.0]).log()
    # ½ ln 2 + ½ ln ⅔
    assert exact_kl(policy, reference).item() == pytest.approx(0.14384103622589045)
    assert entropy_of(policy).item() == pytest.approx(0.6931471805599453)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.2),  # on target
        (6.6, 0.2 * (1 + 0.1 * 512 / 10_000)),
        (5.4, 0.2 * (1 - 0.1 * 512 / 10_000)),
        (60.0, 0.2 * (1 + 0.2 * 512 / 10_000)),  # bounded
        (-3.0, 0.2 * (1 - 0.2 * 512 / 10_000)),
    ],
)
def test_p16_adaptive_controller(kl: float, expected: float) -> None:
    assert AdaptiveKL(0.2, target=6.0, horizon=10_000).updated(kl, 512).coefficient == pytest.approx(expected)


def test_p16_a_fixed_controller_stays() -> None:
    assert FixedKL(0.05).updated(100.0, 512).coefficient == 0.05
