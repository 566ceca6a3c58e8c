"""Log-probabilities of completion tokens under a policy. The language-model head runs on the completions only.

Shapes: B rows, T tokens a row, M tokens that count in all, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def completion_logits(
    network: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    completion_mask: Tensor,
    *,
    position_ids: Tensor | None = None,
    temperature: float = 1.0,
    block_lengths: Sequence[int] | None = None,
) -> Tensor:
    """(M, V) in fp32: the logits that each token under `completion_mask` was to be drawn from, over `temperature`.

    `input_ids` (B, T) and `completion_mask` (B, T), True at tokens that count, row by row; none in the first column,
    before which nothing stands. `attention_mask` (B, T), 1 at tokens and 0 at padding on either side; None for rows
    without padding. Positions are counted from the first token unless given. `block_lengths`: of the sequences of a
    packed row, for models that `training/rows.py` has found to keep them apart. `network` is called as it is, so that
    wrappers of DDP and FSDP take part.
    """
    assert input_ids.ndim == 2 and input_ids.shape == completion_mask.shape
    assert temperature > 0
    counted = completion_mask[:, 1:]  # (B, T - 1): the place before a token is where it is foretold
    columns = counted.any(dim=0).nonzero().squeeze(1)
    if position_ids is None and attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    packed: dict[str, Any] = {}
    if block_lengths is not None:
        # A mask of four dimensions is taken as it is: none is made, which would be as large as the row squared.
        attention_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
        packed["block_lengths"] = tuple(block_lengths)
    output = network(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        logits_to_keep=columns,
        use_cache=False,
        **packed,
    )
    wanted = counted[:, columns]  # (B, K)
    logits: Tensor = output.logits
    # In a single row all columns are wanted: a view then, where a selection would copy.
    chosen = logits[0] if len(logits) == 1 else logits[wanted]  # (M, V)
    chosen = chosen.float()
    return chosen if temperature == 1.0 else chosen / temperature


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token]: (M, V), (M,) -> (M,)."""
    return -torch.nn.functional.cross_entropy(logits, tokens, reduction="none")


def token_entropies(logits: Tensor) -> Tensor:
    """Of the distributions (M, V), in nats: (M,)."""
    logprobs = logits.log_softmax(dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


def completion_logprobs(
    network: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    completion_mask: Tensor,
    *,
    position_ids: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """(B, T) in fp32: log p(token | all before it) at tokens under `completion_mask`, 0 elsewhere.

    Arguments as for `completion_logits`.
    """
    logits = completion_logits(
        network, input_ids, attention_mask, completion_mask, position_ids=position_ids, temperature=temperature
    )
    values = token_logprobs(logits, input_ids[completion_mask])
    return torch.zeros(input_ids.shape, dtype=values.dtype, device=values.device).masked_scatter(
        completion_mask, values
    )
