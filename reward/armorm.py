"""The head of ArmoRM: rewards for many objectives, mixed by a gate that sees the prompt only.

    r = T' W h(last token),   reward = s · Σ_o softmax(MLP(h(prompt)) / τ)_o · r_o

Wang et al., arXiv 2406.12845, section 3. h(prompt) is the hidden state of the token before the assistant's heading: in
Llama 3's template, of the one that ends the user's turn. The published models bring code of their own for this; none of
it runs here.

Shapes: B completions, H hidden width, O objectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from reward.network import PromptGated

REGRESSION, TRANSFORM, GATE, SCALE = "regression_layer.weight", "reward_transform_matrix", "gating.layers.", "gating."
TEMPERATURE = 10.0
"""Of the published models, where config.json does not say (`gating_temperature`)."""


class ArmoHead(PromptGated):
    """As published: linear layers with ReLU between make the gate."""

    def __init__(self, tensors: Mapping[str, Tensor], temperature: float, heading: int) -> None:
        """`tensors`: those of the head, by their published names; `heading`: tokens of an assistant's heading."""
        super().__init__()
        self.heading = heading
        self.regression = nn.Parameter(tensors[REGRESSION])  # (O, H)
        self.transform = nn.Parameter(tensors[TRANSFORM])  # (O, O)
        self.scale = nn.Parameter(tensors[f"{SCALE}logit_scale"])  # (1,)
        self.temperature = temperature
        numbers = sorted({int(name.removeprefix(GATE).split(".")[0]) for name in tensors if name.startswith(GATE)})
        layers: list[nn.Module] = []
        for number in numbers:
            weight, bias = tensors[f"{GATE}{number}.weight"], tensors.get(f"{GATE}{number}.bias")
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
            layers += [*([nn.ReLU()] if layers else []), layer]
        self.gate = nn.Sequential(*layers)

    def forward(self, pooled: Tensor, prompt: Tensor) -> Tensor:
        """`pooled` (B, H) of the last token, `prompt` (B, 2H), of which the first half counts -> (B, 1)."""
        asked = prompt[:, : pooled.shape[1]]
        shares = (self.gate(asked) / self.temperature).softmax(dim=-1) * self.scale  # (B, O)
        rewards = pooled @ self.regression.T @ self.transform  # (B, O)
        total: Tensor = (shares * rewards).sum(dim=-1, keepdim=True)
        return total


def is_armo(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether these tensors are such a head. QRM's, which has quantiles, is not."""
    rows = shapes.get(REGRESSION, (0,))[0]
    return shapes.get(TRANSFORM) == (rows, rows) and f"{SCALE}logit_scale" in shapes and f"{GATE}0.weight" in shapes


def temperature_of(config: Any) -> float:
    """As config.json says."""
    return float(getattr(config, "gating_temperature", TEMPERATURE))
