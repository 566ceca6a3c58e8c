"""Causal attention within the blocks of a packed row, one block at a time: no mask is made, nothing is computed twice.

A mask in blocks costs what full attention over the whole row costs. Registered with transformers under `NAME`; a model
passes `block_lengths` on to it with its other keyword arguments. Without them it is transformers' own sdpa.

Shapes: T tokens a row, A attention heads, K key and value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

NAME = "winnow_blocks"

_CHANGED_ATTENTION = ("softcap", "s_aux", "position_bias", "head_mask", "cu_seq_lens_q")
"""Arguments of transformers' attention functions that mean another sum than softmax(q k) v."""


class UnsupportedAttentionError(Exception):
    """The model computes its attention in a way that cannot be done in blocks here."""


def register() -> None:
    """Makes the function known to transformers; again does nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, block_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    block_lengths: Sequence[int] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`query` (1, A, T, D), `key` and `value` (1, K, T, D) -> (1, T, A, D), and no weights.

    `block_lengths`: of the conversations in the row, which add up to T. Raises `UnsupportedAttentionError`.
    """
    if block_lengths is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        window = {} if sliding_window is None else {"sliding_window": sliding_window}
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **window, **others
        )
        return found
    changed = [name for name in _CHANGED_ATTENTION if others.get(name) is not None]
    if changed:
        raise UnsupportedAttentionError(", ".join(changed))
    group = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    outputs = []
    start = 0
    for length in block_lengths:
        q, k, v = (states[:, :, start : start + length] for states in (query, keys, values))
        mask = _window(length, sliding_window, query.device)
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
            )
        )
        start += length
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _window(length: int, size: int | None, device: torch.device) -> Tensor | None:
    """(length, length) what each token sees within its window; None where that is all before it."""
    if size is None or length <= size:
        return None
    places = torch.arange(length, device=device)
    behind = places[:, None] - places[None]
    return (behind >= 0) & (behind < size)
