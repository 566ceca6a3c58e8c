"""The heads of an ensemble: what each is trained on, and one zero for all.

All see the same prompts, each with weights of its own.

The Bayesian bootstrap (Rubin 1981): weights are drawn from Dirichlet(1, …, 1) over the prompts, here scaled to mean 1.
As the usual bootstrap does, it shows how far the fit would move with another sample of prompts; unlike it, no prompt
drops out, so that no fold of a cross-validation and no small batch is left empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from reward.devices import exact_dtype
from reward.ensembles import EnsembleHead
from reward.network import PooledRewardModel, batches_by_length, collate
from training.batches import EncodedGroup


def with_head_weights(groups: Sequence[EncodedGroup], num_heads: int, seed: int) -> list[EncodedGroup]:
    """The groups with what each head makes of them; unchanged for a single head."""
    if num_heads == 1:
        return list(groups)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(num_heads, len(groups)).exponential_(generator=generator)
    weights = drawn / drawn.mean(dim=1, keepdim=True)
    return [replace(group, head_weights=tuple(weights[:, g].tolist())) for g, group in enumerate(groups)]


@torch.no_grad()
def centre_heads(network: nn.Module, groups: Sequence[EncodedGroup], max_tokens: int) -> None:
    """Shifts each head of an ensemble to average 0 over the groups' completions; other networks stay as they are.

    Comparisons leave a head's zero open, and the lowest of several heads' rewards has a meaning only with a common one.
    """
    if not (isinstance(network, PooledRewardModel) and isinstance(network.head, EnsembleHead)):
        return
    network.eval()
    device = next(network.parameters()).device
    items = [item for group in groups for item in group.items]
    total = torch.zeros(network.head.members.out_features, dtype=exact_dtype(device), device=device)
    for batch in batches_by_length([len(item) for item in items], max_tokens):
        total += network(collate([items[i] for i in batch], device), by_head=True).to(total.dtype).sum(dim=0)
    network.head.members.bias.sub_(total / len(items))
