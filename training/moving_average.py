"""Averaged weights: a policy that is smoother than any of its steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class WeightAverage:
    """Exponential moving average of named weights: w̄ ← d · w̄ + (1 − d) · w, once an iteration.

    InstructGPT (arXiv 2203.02155, appendix C.4) takes d = 0.992. Kept in fp32 on the CPU.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        assert 0 <= decay < 1
        self.decay = decay
        self.weights = {name: _copied(value) for name, value in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Takes in the weights as they are now. Raises KeyError for other names than at the start."""
        if weights.keys() != self.weights.keys():
            raise KeyError(f"other weights than at the start: {sorted(weights.keys() ^ self.weights.keys())[:3]}")
        for name, value in weights.items():
            self.weights[name].lerp_(_copied(value), 1 - self.decay)


def _copied(value: Tensor) -> Tensor:
    return value.detach().to(device="cpu", dtype=torch.float32, copy=True)
