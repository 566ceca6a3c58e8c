"""Sequences laid out one behind the other, shared beginnings once, nothing padded; and what is kept of beginnings.

Shapes: T tokens of a pass, C tokens of remembered prefixes before them, B sequences, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from reward.devices import sent
from reward.manifest import Pooling
from reward.rendering import Rendered, SharedPrefix
from reward.shared_prefix import LEAST_SHARED, common_prefix


class Span(NamedTuple):
    """Rows from `start` to before `stop`."""

    start: int
    stop: int


@dataclass(slots=True, eq=False)
class EncodedPrefix:
    """A beginning with what later tokens need of it."""

    ids: list[int]
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of each layer, the keys and values (1, heads, tokens, head width)."""
    hidden: list[Tensor] = field(default_factory=list)
    """(tokens, H) of each layer that heads read."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """Rows that see all of a prefix besides the earlier rows of their own block."""

    rows: Span
    known: EncodedPrefix | None
    num_known: int
    """Tokens from the start of `known` that belong to the prefix."""
    fresh: Span
    """Rows of this pass with the rest of it; may be empty."""
    result: EncodedPrefix | None
    """Where the whole prefix is kept, if it is."""


@dataclass(frozen=True, slots=True)
class Pack:
    """One pass over sequences of several requests."""

    ids: list[int]  # T
    positions: list[int]  # T
    blocks: list[Span]
    """Rows that see one another, each the earlier ones: the new part of a prefix, and what is a sequence's own."""
    crossings: list[Crossing]
    known: list[tuple[EncodedPrefix, int]]
    """Remembered beginnings in use and how many of their tokens; their hidden states precede those of the rows."""
    rows_of: list[list[Span]]
    """Where each sequence lies among remembered and new tokens, C + T, in the order of the sequences."""
    order: list[int]
    """Which of the sequences given each of `rows_of` is."""

    def masks(self, items: Sequence[Rendered], device: torch.device) -> tuple[Tensor, Tensor]:
        """Which of the C + T tokens are a sequence's prompt and its completion, (B, C + T), in the items' order."""
        total = sum(count for _, count in self.known) + len(self.ids)
        prompt = torch.zeros(len(items), total, dtype=torch.bool)
        completion = torch.zeros_like(prompt)
        for index, spans in zip(self.order, self.rows_of, strict=True):
            passed, start = 0, items[index].completion_start
            for span in spans:
                length = span.stop - span.start
                boundary = span.start + min(max(start - passed, 0), length)
                prompt[index, span.start : boundary] = True
                completion[index, boundary : span.stop] = True
                passed += length
        return sent(prompt, device), sent(completion, device)


class PrefixCache:
    """The latest beginnings, up to `max_tokens` of them. For one thread."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._entries: list[EncodedPrefix] = []
        """Latest used last."""

    def find(self, ids: list[int]) -> tuple[EncodedPrefix | None, int]:
        """The entry that shares most with the start of `ids`, if it is worth it, and how many tokens that is."""
        best, most = None, LEAST_SHARED - 1
        for entry in self._entries:
            shared = common_prefix((entry.ids, ids))
            if shared > most:
                best, most = entry, shared
        if best is not None:
            self._entries.remove(best)
            self._entries.append(best)
        return best, most if best is not None else 0

    def clear(self) -> None:
        self._entries = []

    def fits(self, length: int) -> bool:
        return length <= self._max_tokens

    def put(self, entry: EncodedPrefix) -> None:
        """Keeps an entry, in place of those it begins with, and lets go of the longest unused."""
        kept = [other for other in self._entries if entry.ids[: len(other.ids)] != other.ids]
        self._entries = [*kept, entry]
        while sum(len(other.ids) for other in self._entries) > self._max_tokens:
            self._entries.pop(0)


def pack(items: Sequence[Rendered], cache: PrefixCache) -> Pack:
    """Lays out the items, each of which has a prefix, request after request."""
    requests: dict[SharedPrefix, list[int]] = {}
    for index, item in enumerate(items):
        assert item.prefix is not None
        requests.setdefault(item.prefix, []).append(index)
    found = [cache.find(items[members[0]].ids[: prefix.length]) for prefix, members in requests.items()]
    known = [(entry, count) for entry, count in found if entry is not None]
    made = Pack([], [], [], [], known, [], [])
    before, total_known = 0, sum(count for _, count in known)
    for (prefix, members), (entry, count) in zip(requests.items(), found, strict=True):
        begins = items[members[0]].ids[: prefix.length]
        fresh = _append(made, begins[count:], count)
        keeps = cache.fits(prefix.length) and count < prefix.length
        result = EncodedPrefix(begins) if keeps else None
        if entry is not None and fresh.stop > fresh.start:
            made.crossings.append(Crossing(fresh, entry, count, Span(fresh.start, fresh.start), None))
        shared = [Span(before, before + count), Span(fresh.start + total_known, fresh.stop + total_known)]
        before += count
        for index in members:
            own = _append(made, items[index].ids[prefix.length :], prefix.length)
            made.rows_of.append([*shared, Span(own.start + total_known, own.stop + total_known)])
            made.order.append(index)
        made.crossings.append(Crossing(Span(fresh.stop, len(made.ids)), entry, count, fresh, result))
    return made


def _append(made: Pack, ids: list[int], position: int) -> Span:
    """Adds a block whose first token stands at `position` of its sequence."""
    rows = Span(len(made.ids), len(made.ids) + len(ids))
    if ids:
        made.ids.extend(ids)
        made.positions.extend(range(position, position + len(ids)))
        made.blocks.append(rows)
    return rows


def pool_packed(hidden: Tensor, mask: Tensor, kept: Tensor, pooling: Sequence[Pooling]) -> Tensor:
    """As `network.pool`, from tokens (T, H) that sequences share: `mask` and `kept` (B, T) -> (B, H × poolings).

    A sequence's tokens come in order, so its last one is the last that its mask has.
    """
    hidden = hidden.float()
    places = torch.arange(hidden.shape[0], device=hidden.device)
    parts = []
    for kind in pooling:
        if kind == "last":
            parts.append(hidden[(mask * places).amax(dim=1)])
        else:
            share = kept.float()
            parts.append(share @ hidden / share.sum(dim=1, keepdim=True).clamp(min=1))
    return torch.cat(parts, dim=-1)
