"""Prompts with their completions as padded batches: prompts end, and completions begin, at one column.

Shapes: B rows, P prompt columns, C completion columns, T = P + C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One completion behind its prompt, as token ids. Neither is empty."""

    prompt: Sequence[int]
    completion: Sequence[int]
    """With its end token, where it came to one."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Prompts padded on the left, completions on the right."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T) 1 for tokens, 0 for padding on either side
    position_ids: Tensor  # (B, T) counted from each row's first token
    completion_mask: Tensor  # (B, T) True for completion tokens
    prompt_width: int
    """P"""

    @property
    def completion_width(self) -> int:
        """C"""
        return self.input_ids.shape[1] - self.prompt_width

    @property
    def slots(self) -> Tensor:
        """(B, C) True for completion tokens, without the prompts' columns."""
        return self.completion_mask[:, self.prompt_width :]


def collate_sequences(rows: Sequence[TokenSequence], pad_id: int, device: torch.device) -> SequenceBatch:
    """Pads to the longest prompt and the longest completion. What stands in the padding never counts."""
    prompt_width = max(len(row.prompt) for row in rows)
    completion_width = max(len(row.completion) for row in rows)
    ids = [
        [pad_id] * (prompt_width - len(row.prompt))
        + list(row.prompt)
        + list(row.completion)
        + [pad_id] * (completion_width - len(row.completion))
        for row in rows
    ]
    columns = torch.arange(prompt_width + completion_width)
    starts = torch.tensor([prompt_width - len(row.prompt) for row in rows])[:, None]
    ends = torch.tensor([prompt_width + len(row.completion) for row in rows])[:, None]
    attention = ((columns >= starts) & (columns < ends)).long()
    return SequenceBatch(
        torch.tensor(ids, device=device),
        attention.to(device),
        (attention.cumsum(dim=1) - 1).clamp(min=0).to(device),
        ((columns >= prompt_width) & (columns < ends)).to(device),
        prompt_width,
    )


def in_slots(values: Tensor, slots: Tensor) -> Tensor:
    """Values (M,) of the tokens under `slots` (B, C), row by row, as (B, C); 0 elsewhere."""
    return torch.zeros(slots.shape, dtype=values.dtype, device=values.device).masked_scatter(slots, values)


def padded(rows: Sequence[Tensor], width: int | None = None) -> Tensor:
    """Rows (n, …) of different lengths as (B, C, …), 0 behind each."""
    width = width or max(len(row) for row in rows)
    result = rows[0].new_zeros(len(rows), width, *rows[0].shape[1:])
    for place, row in enumerate(rows):
        result[place, : len(row)] = row
    return result
