"""Value models of PPO: what the rest of a completion is worth, at each of its tokens.

Two kinds. A small network on the reference's last hidden states, which the KL penalty needs anyway; or, as InstructGPT
has it, a whole model that starts as the reward model.

Shapes: B rows, C completion tokens, H hidden width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from reward.errors import ModelLoadError
from reward.model import load_reward_model
from reward.network import PooledRewardModel, hidden_size
from training.options import OptionsError
from training.sequences import SequenceBatch


class StateValues(nn.Module):
    """Two layers on frozen hidden states. The last one starts at 0, and so do all values."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden_width)
        self.outer = nn.Linear(hidden_width, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, states: Tensor) -> Tensor:
        """(B, C, H) -> (B, C)"""
        return cast(Tensor, self.outer(torch.tanh(self.inner(states.float())))).squeeze(-1)


class RewardValues(nn.Module):
    """A decoder with a linear head that starts as the reward model, on the policy's own token ids."""

    def __init__(self, backbone: nn.Module, head: nn.Linear, offset: float, scale: float) -> None:
        """`offset`, `scale`: values are (head − offset) · scale, in the unit of the scores that PPO sees."""
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.offset = offset
        self.scale = scale

    def forward(self, batch: SequenceBatch) -> Tensor:
        """(B, C): at each completion token, of what stands before it."""
        hidden = self.backbone(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        before = hidden[:, batch.prompt_width - 1 : -1]  # (B, C, H)
        return (cast(Tensor, self.head(before)).squeeze(-1).float() - self.offset) * self.scale


def state_values(policy_model: Any, hidden_width: int) -> StateValues:
    """For the hidden states that a language model's head sees."""
    plain = policy_model.get_base_model() if hasattr(policy_model, "peft_config") else policy_model
    return StateValues(hidden_size(plain), hidden_width)


def reward_values(
    source: str, tokenizer: Any, *, score_shift: float, score_scale: float, trust_remote_code: bool
) -> RewardValues:
    """A value model that starts as the reward model `source`.

    Raises `OptionsError` for one that cannot: its head is not a linear one on the last token of a decoder, or its
    tokens are not the policy's.
    """
    try:
        model = load_reward_model(source, device="cpu", dtype="float32", trust_remote_code=trust_remote_code)
    except ModelLoadError as error:
        raise OptionsError(f"value_base: {error}") from error
    network = model.network
    simple = isinstance(network, PooledRewardModel) and network.pooling == ("last",) and not network.earlier_layers
    if not simple or not isinstance(cast(Any, network).head, nn.Linear):
        raise OptionsError(
            f"value_base: {source!r} has a head that does not give a value at each token (a linear one on the last "
            "token of a decoder does); leave value_base out"
        )
    if model.renderer.vocabulary != tokenizer.get_vocab():
        raise OptionsError(f"value_base: the tokens of {source!r} are not the policy's; leave value_base out")
    pooled = cast(PooledRewardModel, network)
    pooled.requires_grad_(True)
    without_dropout(pooled)
    scale = model.manifest.normalisation
    # value = ((raw − mean) / std − shift) · score_scale
    offset = scale.mean + score_shift * scale.std
    return RewardValues(pooled.backbone, cast(nn.Linear, pooled.head), offset, score_scale / scale.std)


def without_dropout(model: nn.Module) -> None:
    """Takes dropout out for good: PPO compares log-probabilities of two passes, which must be the same function."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
