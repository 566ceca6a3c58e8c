"""Conversations -> tensors: padded rows, or one packed row in which no conversation sees another.

A packed row has no padding. Its positions start anew with each conversation, and attention stays within them
(`block_attention`), in models that keep to both: `choose_layout` finds out.

Shapes: S conversations, B rows, T tokens a row, M tokens that count in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from reward.network import batches_by_length
from training.block_attention import NAME, UnsupportedAttentionError, register
from training.logprobs import completion_logits, token_logprobs
from training.policies import Policy

TOLERANCE = 1e-4
"""Largest difference between the logits of a packed and a single conversation, as a share of the largest logit."""


class Sequenced(Protocol):
    """What rows are made of; `training.conversations.Conversation` is one."""

    @property
    def ids(self) -> list[int]:
        """Token ids."""

    @property
    def completion_mask(self) -> list[bool]:
        """True at tokens that count, never at the first."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Rows:
    """A micro-batch."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor | None  # (B, T) 1 at tokens, 0 at padding; None without padding
    position_ids: Tensor  # (B, T) from 0 within each conversation
    completion_mask: Tensor  # (B, T) True at tokens that count
    owners: Tensor  # (M,) which conversation each token that counts is of
    block_lengths: tuple[int, ...] | None = None
    """Of a packed row: tokens of each conversation."""

    @property
    def tokens(self) -> Tensor:
        """(M,) the tokens that count."""
        return self.input_ids[self.completion_mask]

    def logits(self, network: Any, temperature: float = 1.0) -> Tensor:
        """(M, V), see `training.logprobs.completion_logits`."""
        return completion_logits(
            network,
            self.input_ids,
            self.attention_mask,
            self.completion_mask,
            position_ids=self.position_ids,
            temperature=temperature,
            block_lengths=self.block_lengths,
        )

    def logprobs(self, network: Any, temperature: float = 1.0) -> Tensor:
        """(M,) log-probabilities of the tokens that count."""
        return token_logprobs(self.logits(network, temperature), self.tokens)

    def sums(self, values: Tensor, num_conversations: int) -> Tensor:
        """(M,) -> (S,): added up by conversation."""
        return values.new_zeros(num_conversations).index_add(0, self.owners, values)


def padded(items: Sequence[Sequenced], pad_id: int, device: torch.device) -> Rows:
    """A row for each, filled up on the right."""
    width = max(map(len, items))
    lengths = torch.tensor([len(item) for item in items])
    positions = torch.arange(width).expand(len(items), width)
    mask = torch.tensor([item.completion_mask + [False] * (width - len(item)) for item in items])
    return Rows(
        torch.tensor([item.ids + [pad_id] * (width - len(item)) for item in items], device=device),
        (positions < lengths[:, None]).long().to(device),
        positions.to(device),
        mask.to(device),
        torch.arange(len(items)).repeat_interleave(mask.sum(dim=1)).to(device),
    )


def packed(items: Sequence[Sequenced], device: torch.device) -> Rows:
    """All in one row, one behind the other."""
    counts = torch.tensor([sum(item.completion_mask) for item in items])
    return Rows(
        torch.tensor([[token for item in items for token in item.ids]], device=device),
        None,
        torch.cat([torch.arange(len(item)) for item in items])[None].to(device),
        torch.tensor([[kept for item in items for kept in item.completion_mask]], device=device),
        torch.arange(len(items)).repeat_interleave(counts).to(device),
        tuple(map(len, items)),
    )


@dataclass(frozen=True, slots=True)
class Layout:
    """How conversations become micro-batches."""

    max_tokens: int
    """Tokens of a micro-batch, padding included; one conversation always fits."""
    pad_id: int
    packs: bool

    def split(self, lengths: Sequence[int]) -> list[list[int]]:
        """Positions of the conversations of each micro-batch."""
        return bins(lengths, self.max_tokens) if self.packs else batches_by_length(lengths, self.max_tokens)

    def split_groups(self, sizes: Sequence[tuple[int, int, int]]) -> list[list[int]]:
        """The same for groups that must stay together: (conversations, tokens of the longest, tokens of all)."""
        if self.packs:
            return bins([tokens for _, _, tokens in sizes], self.max_tokens)
        batches: list[list[int]] = []
        width = count = 0
        for index in sorted(range(len(sizes)), key=lambda i: -sizes[i][1]):
            rows, longest, _ = sizes[index]
            if batches and width * (count + rows) <= self.max_tokens:
                batches[-1].append(index)
                count += rows
            else:
                batches.append([index])
                width, count = longest, rows
        return batches

    def rows(self, items: Sequence[Sequenced], device: torch.device) -> Rows:
        """One micro-batch."""
        return packed(items, device) if self.packs else padded(items, self.pad_id, device)


def bins(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Positions in bins of at most `size` tokens, first-fit decreasing; what is longer has one of its own."""
    filled: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((at for at, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            filled.append([])
            room.append(size)
            place = len(filled) - 1
        filled[place].append(index)
        room[place] -= lengths[index]
    return filled


@dataclass(frozen=True, slots=True)
class _Trial:
    ids: list[int]
    completion_mask: list[bool]

    def __len__(self) -> int:
        return len(self.ids)


def choose_layout(policy: Policy, packing: Literal["auto", "off"], max_tokens: int) -> Layout:
    """Packed rows where that is wanted and this model computes the same in them; padded ones else."""
    packs = packing == "auto" and pack_rows(policy.plain, len(policy.tokenizer))
    return Layout(max_tokens, policy.pad_id, packs)


def pack_rows(model: Any, vocab_size: int) -> bool:
    """Makes a model ready for packed rows; False, and the model as it was, where it would not compute the same."""
    before = getattr(model.config, "_attn_implementation", None)
    if before not in ("sdpa", NAME):
        return False
    register()
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation == NAME and _packs_exactly(model, vocab_size):
        return True
    model.set_attn_implementation(before)
    return False


@torch.no_grad()
def _packs_exactly(model: Any, vocab_size: int) -> bool:
    """Tries three short conversations in one row and apart. Leaves the model as it found it, and chance too."""
    device = next(model.parameters()).device
    items = [
        _Trial(
            [(13 * place + 31 * number + 5) % vocab_size for place in range(length)], [False] + [True] * (length - 1)
        )
        for number, length in enumerate((7, 3, 11))
    ]
    was_training = model.training
    model.eval()
    try:
        together = packed(items, device).logits(model)
        apart = torch.cat([padded([item], 0, device).logits(model) for item in items])
    except (TypeError, ValueError, RuntimeError, UnsupportedAttentionError):
        return False  # This model takes no positions of others, or no blocks.
    finally:
        model.train(was_training)
    return bool((together - apart).abs().max() <= TOLERANCE * apart.abs().max())
