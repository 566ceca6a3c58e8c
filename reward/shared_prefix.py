"""Which sequences share a beginning, whether that pays, and which of them go into one batch. Plain lists, no torch.

The candidates of one request differ in their completion only. What they begin with is encoded once, and each
completion follows with the keys and values of that; `shared_prefix_model.py` does it. The shared beginning is taken
from the token ids of the whole sequences, so it is exact for every template and every cut.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal
from weakref import WeakValueDictionary

from reward.batching import BatchingOptions, take_batch
from reward.rendering import Rendered, SharedPrefix

SharingMode = Literal["auto", "off"]

CACHE_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class SharingOptions:
    """Whether prompts are encoded once for all their completions."""

    mode: SharingMode = "auto"
    """`auto`: where the model can and it pays. `off`: never."""
    cache_tokens: int = CACHE_TOKENS
    """Tokens of the latest prompts whose keys and values are kept for the next batch or request."""

    def __post_init__(self) -> None:
        if self.cache_tokens < 0:
            raise ValueError(f"cache_tokens must be at least 0, not {self.cache_tokens}")


LEAST_SHARED = 8
LEAST_SAVED = 0.05
"""A prefix is shared from this many tokens on, if that saves this share of all tokens. Attention in two parts that are
merged costs as much as a few per cent of the tokens; a shorter prefix than this saves less than it costs."""
LEAST_REMEMBERED = 32
"""A single completion's prompt is kept from this many tokens on."""


def common_prefix(rows: Sequence[list[int]]) -> int:
    """Tokens that all rows have in common from their start."""
    # In sorted order the first and the last row differ the earliest; both comparisons run in C.
    first, last = min(rows), max(rows)
    limit = min(len(first), len(last))
    # The predicate turns from False to True once, at the first token that differs.
    return bisect_left(range(limit), True, key=lambda i: first[: i + 1] != last[: i + 1])


def share_prefix(items: Sequence[Rendered], cache_tokens: int = 0) -> list[Rendered]:
    """The sequences of one request, marked with their shared beginning where encoding it once pays.

    Where `cache_tokens` can hold it until more of them come, that is their prompt, also of a single one: what these
    completions happen to have in common the next may not have.
    """
    if not items or any(item.token_type_ids is not None for item in items):
        return list(items)
    if len(items) == 1:
        length = items[0].completion_start
        kept = LEAST_REMEMBERED <= length <= cache_tokens
        return [replace(items[0], prefix=SharedPrefix(length))] if kept else list(items)
    # At least one token of each stays its own: it carries the reward.
    length = min(common_prefix([item.ids for item in items]), min(map(len, items)) - 1)
    if 0 < cache_tokens >= length:
        length = min(length, *(item.completion_start for item in items))
    saved = (len(items) - 1) * length
    if length < LEAST_SHARED or saved < LEAST_SAVED * sum(map(len, items)):
        return list(items)
    prefix = SharedPrefix(length)
    return [replace(item, prefix=prefix) for item in items]


class LivePrefixes:
    """Makes one of the prefixes that begin alike, for as long as anybody uses it: several calls for one prompt then
    share it as one call does. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._live: WeakValueDictionary[tuple[int, ...], SharedPrefix] = WeakValueDictionary()
        self._lock = threading.Lock()

    def of(self, ids: Sequence[int]) -> SharedPrefix:
        """The one of exactly these tokens."""
        with self._lock:
            return self._live.setdefault(tuple(ids), SharedPrefix(len(ids)))

    def unified(self, items: Sequence[Rendered]) -> list[Rendered]:
        """The sequences of one call with the prefix that others use already, if they have one."""
        prefix = items[0].prefix if items else None
        if prefix is None:
            return list(items)
        live = self.of(items[0].ids[: prefix.length])
        return [replace(item, prefix=live) for item in items]


def take_sharing(items: Sequence[Rendered], options: BatchingOptions, *, one_request: bool) -> list[int]:
    """A `TakeBatch`: like goes with like, sharing sequences by requests and others by length, as the oldest is.

    Of the oldest's request come as many as keep to `max_batch_tokens` of their own; what they share comes on top, for
    it stays there for the next batch. Other requests join whole or not at all, with all their tokens counted. With
    `one_request` nobody joins, and own tokens are counted with their padding.
    """
    if items[0].prefix is None:
        alone = [index for index, item in enumerate(items) if item.prefix is None]
        return [alone[place] for place in take_batch([len(items[index]) for index in alone], options)]
    most_tokens = math.inf if options.max_batch_tokens is None else options.max_batch_tokens
    requests: dict[SharedPrefix, list[int]] = {}
    for index, item in enumerate(items):
        if item.prefix is not None:
            requests.setdefault(item.prefix, []).append(index)
    oldest, *others = requests.items()
    batch: list[int] = []
    tokens = longest = 0
    for index in oldest[1][: options.max_batch_size]:
        own = len(items[index]) - oldest[0].length
        longest = max(longest, own)
        grown = longest * (len(batch) + 1) if one_request else tokens + own
        if batch and grown > most_tokens:
            break
        batch.append(index)
        tokens = grown
    if one_request or len(batch) < len(oldest[1]):
        return batch
    for prefix, members in others:
        size = prefix.length + sum(len(items[index]) - prefix.length for index in members)
        if len(batch) + len(members) <= options.max_batch_size and tokens + size <= most_tokens:
            batch.extend(members)
            tokens += size
    return batch
