"""Sampling from a policy under training: batches with left padding and a cache, chance handed in.

Nothing but the temperature stands between the model and the draw: no top-k, no top-p, no penalties, whatever the
checkpoint's generation settings say; the log-probabilities of training would not be those of the samples.

Shapes: B rows, P prompt tokens, C completion tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

KEPT_SHARE = 0.5
"""Rows that have ended are dropped from the batch when no more than this share is still being written."""


def uniforms(seed: int, stream: str, rows: Sequence[int], count: int) -> Tensor:
    """(B, count) numbers in [0, 1) that depend on the seed, the stream's name and the row alone.

    So a completion is the same whichever process draws it, in whichever batch, before or after a restart.
    """
    drawn = []
    for row in rows:
        generator = random.Random(f"{seed}/{stream}/{row}")  # noqa: S311  # samples, not secrets
        drawn.append([generator.random() for _ in range(count)])
    return torch.tensor(drawn, dtype=torch.float64).view(len(rows), count)


def draw(logits: Tensor, chance: Tensor, temperature: float) -> Tensor:
    """Tokens (B,) from logits (B, V) by numbers (B,) in [0, 1): the first whose cumulated probability is past it."""
    assert temperature > 0
    device = logits.device
    # Apple's GPUs have no fp64.
    exact = logits.cpu() if device.type == "mps" else logits
    cumulated = (exact.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    # By the sum as it came out: rounding must not leave a gap above the last token.
    wanted = (chance.to(cumulated.device) * cumulated[:, -1]).unsqueeze(-1)
    drawn = torch.searchsorted(cumulated, wanted, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    return drawn.to(device)


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    chance: Tensor,
    *,
    temperature: float,
    stop_ids: Collection[int],
    pad_id: int,
) -> list[list[int]]:
    """One completion for each prompt, up to and with its end token, at most as long as `chance` (B, C) is wide.

    `model`: a causal language model of transformers. It decodes in evaluation mode: one that recomputes activations in
    training keeps no cache there.
    """
    was_training = model.training
    model.eval()
    try:
        return _decoded(model, prompts, chance, temperature, stop_ids, pad_id)
    finally:
        model.train(was_training)


def _decoded(
    model: Any,
    prompts: Sequence[Sequence[int]],
    chance: Tensor,
    temperature: float,
    stop_ids: Collection[int],
    pad_id: int,
) -> list[list[int]]:
    assert len(prompts) == len(chance)
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()  # (B, P)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    completions: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    """Of the batch as it still is: which prompt each row belongs to."""
    open_rows = set(rows)
    cache: Any = None
    for step in range(chance.shape[1]):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        tokens = draw(output.logits[:, -1], chance[rows, step], temperature)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row in open_rows:
                completions[row].append(token)
                if token in stop_ids:
                    open_rows.discard(row)
        if not open_rows:
            break
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        ids, positions = tokens.unsqueeze(1), positions[:, -1:] + 1
        if len(open_rows) <= KEPT_SHARE * len(rows):
            kept = torch.tensor([place for place, row in enumerate(rows) if row in open_rows], device=device)
            cache.batch_select_indices(kept)
            ids, positions, mask = ids[kept], positions[kept], mask[kept]
            rows = [row for row in rows if row in open_rows]
    return completions
