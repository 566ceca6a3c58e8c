"""Attention over a pack, in two parts merged by their log-sum-exp: a row's own block, and the prefix before it.

All rows that share a prefix meet its keys and values in one call, so these are read once; see Ye et al., "Cascade
Inference" (flashinfer.ai, 2024), and Juravsky et al., "Hydragen" (arXiv 2402.05099, section 3.2). With o, l of either
part, the whole is (o_a e^{l_a} + o_b e^{l_b}) / (e^{l_a} + e^{l_b}), that is o_a + sigmoid(l_b - l_a) (o_b - o_a).

Registered with transformers under `NAME`; a backbone passes `pack` on to it with its other keyword arguments.

Shapes: T rows, A attention heads, K key and value heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reward.shared_prefix_pack import Crossing, Pack

NAME = "winnow_shared_prefix"

_CHANGED_ATTENTION = ("softcap", "s_aux", "position_bias", "head_mask", "cu_seq_lens_q")
"""Arguments of transformers' attention functions that mean another sum than softmax(q k) v."""


class UnsupportedAttentionError(Exception):
    """The model computes its attention in a way that cannot be taken apart here."""


def register() -> None:
    """Makes the function known to transformers; again does nothing.

    Compiled networks leave it out: with the layout of each pack it would be compiled anew.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, torch.compiler.disable(shared_prefix_attention))  # type: ignore[no-untyped-call]


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pack: Pack,
    max_length: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`query` (1, A, T, D), `key` and `value` (1, K, T, D) -> (1, T, A, D), and no weights.

    `max_length`: of any sequence; a window that holds it all is none. Raises `UnsupportedAttentionError`.
    """
    changed = [name for name in _CHANGED_ATTENTION if others.get(name) is not None]
    if changed or (sliding_window is not None and sliding_window < max_length):
        raise UnsupportedAttentionError(", ".join(changed) or f"a window of {sliding_window} tokens")
    merged = torch.empty_like(query.transpose(1, 2))  # (1, T, A, D)
    sums = query.new_empty(query.shape[:3], dtype=torch.float32)  # (1, A, T)
    for start, stop in pack.blocks:
        rows = slice(start, stop)
        out, sums[:, :, rows] = attend(query[:, :, rows], key[:, :, rows], value[:, :, rows], scaling, causal=True)
        merged[:, rows] = out.transpose(1, 2)
    for crossing in pack.crossings:
        rows = slice(*crossing.rows)
        keys, values = _prefix(crossing, key, value, int(module.layer_idx))  # type: ignore[arg-type]  # an int
        if crossing.rows.start == crossing.rows.stop:
            continue
        out, seen = attend(query[:, :, rows], keys, values, scaling, causal=False)
        weight = torch.sigmoid(seen - sums[:, :, rows]).transpose(1, 2).unsqueeze(-1)  # (1, rows, A, 1)
        merged[:, rows] = torch.lerp(merged[:, rows], out.transpose(1, 2), weight.to(out.dtype))
    return merged, None


def _prefix(crossing: Crossing, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole prefix, remembered and new; kept where the crossing says so."""
    fresh = slice(*crossing.fresh)
    keys, values = key[:, :, fresh], value[:, :, fresh]
    if crossing.known is not None:
        known_keys, known_values = (states[:, :, : crossing.num_known] for states in crossing.known.layers[layer])
        if crossing.fresh.start == crossing.fresh.stop:
            keys, values = known_keys, known_values
        else:
            keys, values = torch.cat([known_keys, keys], dim=2), torch.cat([known_values, values], dim=2)
    if crossing.result is not None:
        # A view would keep alive what the whole pass computed.
        crossing.result.layers[layer] = (keys.clone(), values.clone())
    return keys, values


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention (1, A, R, D) with the log-sum-exp of its scores (1, A, R), which torch's public function keeps."""
    kernels = torch.ops.aten
    if query.device.type == "cpu" and value.shape[-1] == query.shape[-1]:
        out, sums = kernels._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
        return out, sums
    if query.device.type == "cuda" and query.dtype != torch.float32 and query.shape[-1] % 8 == 0:
        out, sums, *_ = kernels._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
        return out, sums
    return attend_plainly(query, key, value, scale, causal=causal)


def attend_plainly(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """`attend` as its definition says, for devices without a kernel that gives the log-sum-exp."""
    group = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query @ keys.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    sums = scores.logsumexp(dim=-1)
    return (scores - sums.unsqueeze(-1)).exp().to(values.dtype) @ values, sums
