"""Runs a decoder over sequences that share beginnings, and finds out on load whether it may.

Two ways, both exact: `packed`, one pass with attention of ours (`shared_prefix_attention.py`), which also knows the
latest beginnings; and `expanded`, the beginning in a pass of its own and its keys and values then repeated, in the
model's own attention, for those with windows or other scores. What neither fits is scored in padded batches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor

from feedback.records import Message
from reward import shared_prefix_attention
from reward.devices import sent
from reward.network import PooledRewardModel, PromptGated, collate, without_heading
from reward.rendering import Rendered, Renderer, SharedPrefix
from reward.shared_prefix import share_prefix
from reward.shared_prefix_pack import Pack, PrefixCache, pack, pool_packed

logger = logging.getLogger(__name__)

Way = Literal["packed", "expanded"]

CPU_PREFILL_TOKENS = 256
GPU_PREFILL_TOKENS = 2048
"""Encoded ahead in one pass. On one thread 0.3 s with the shipped model, where a pass costs as much as some 40 tokens
before its first."""

TOLERANCE = 1e-4
HALF_PRECISION_TOLERANCE = 0.1
"""How far from plain passes rewards may be on load, in fp32 and in bf16 or fp16; times the reward if that is over 1."""


class SharedPrefixModel:
    """A network with one of the ways. For one thread."""

    def __init__(
        self,
        network: PooledRewardModel,
        device: torch.device,
        way: Way,
        *,
        max_length: int,
        cache_tokens: int = 0,
    ) -> None:
        """`max_length`: of any sequence, in tokens; `cache_tokens`: how many of prefixes are remembered (`packed`)."""
        self.way: Way = way
        self._network = network
        self._backbone = cast(Any, network.backbone)
        self._device = device
        self._max_length = max_length
        self.cache_tokens = cache_tokens if way == "packed" else 0
        self._cache = PrefixCache(self.cache_tokens)
        if way == "packed":
            shared_prefix_attention.register()

    @torch.inference_mode()
    def raw_rewards(self, items: Sequence[Rendered], *, by_head: bool = False) -> Tensor:
        """Raw rewards (B,) in fp32 of items that each have a prefix; `by_head`: of each head by itself, (B, K).

        Out of memory, it lets go of what it remembers.
        """
        rewards = self._by_head(items)
        return rewards if by_head else self._network.combine(rewards)

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> int:
        """Encodes some more of the tokens that sequences will begin with, and remembers them (`packed`): no more than
        whatever comes meanwhile should wait for.

        Returns how many are remembered now: all but the last, in the end.
        """
        _, known = self._cache.find(ids)
        most = CPU_PREFILL_TOKENS if self._device.type == "cpu" else GPU_PREFILL_TOKENS
        end = min(known + most, len(ids))
        if end - 1 > known:
            # Whatever lies behind a prefix; its reward is nobody's.
            self._packed([Rendered(ids[:end], end - 1, None, False, end - 1, 1, SharedPrefix(end - 1))])
        return max(known, end - 1)

    def _by_head(self, items: Sequence[Rendered]) -> Tensor:
        if self.way == "packed":
            try:
                return self._packed(items)
            except torch.OutOfMemoryError:
                self._cache.clear()
                raise
        order = by_prefix(items)
        rewards = torch.cat([self._expanded([items[index] for index in members]) for members in order])
        return rewards[torch.tensor([index for members in order for index in members]).argsort().to(self._device)]

    def _packed(self, items: Sequence[Rendered]) -> Tensor:
        made = pack(items, self._cache)
        with _attention(self._backbone, shared_prefix_attention.NAME):
            hidden = self._network.read(
                input_ids=sent(torch.tensor([made.ids]), self._device),
                position_ids=sent(torch.tensor([made.positions]), self._device),
                # In four dimensions transformers leaves a mask alone; ours looks at none.
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self._device),
                use_cache=False,
                pack=made,
                max_length=self._max_length,
            )
        states = [
            torch.cat([*(entry.hidden[layer][:count] for entry, count in made.known), new[0]])
            for layer, new in enumerate(hidden)
        ]
        rewards = self._rewards(states, made, items)
        # Where attention masks by a weight of 0, a NaN reaches the tokens before it, too: what others share with it.
        if bool(torch.isfinite(rewards).all()):
            self._remember(made, hidden)
        return rewards

    def _remember(self, made: Pack, hidden: Sequence[Tensor]) -> None:
        for crossing in made.crossings:
            entry = crossing.result
            if entry is None:
                continue
            for layer, new in enumerate(hidden):
                fresh = new[0, slice(*crossing.fresh)]
                known = crossing.known
                entry.hidden.append(
                    fresh.clone() if known is None else torch.cat([known.hidden[layer][: crossing.num_known], fresh])
                )
            self._cache.put(entry)

    def _expanded(self, items: Sequence[Rendered]) -> Tensor:
        """Items of one request."""
        from transformers import DynamicCache

        prefix = cast(SharedPrefix, items[0].prefix).length
        made = pack(items, self._cache)
        cache = DynamicCache(config=self._backbone.config)
        ids = sent(torch.tensor([items[0].ids[:prefix]]), self._device)
        begun = self._network.read(input_ids=ids, past_key_values=cache, use_cache=True)
        cast(Any, cache).batch_repeat_interleave(len(items))
        lengths = torch.tensor([len(item) - prefix for item in items])
        own = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, R)
        rows = torch.zeros(own.shape, dtype=torch.long)
        rows[own] = torch.tensor(made.ids[prefix:])
        seen = torch.cat([torch.ones(len(items), prefix, dtype=torch.bool), own], dim=1).long()
        went_on = self._network.read(
            input_ids=sent(rows, self._device),
            attention_mask=sent(seen, self._device),
            past_key_values=cache,
            use_cache=True,
        )
        kept = sent(own, self._device)
        states = [torch.cat([first[0], rest[kept]]) for first, rest in zip(begun, went_on, strict=True)]
        return self._rewards(states, made, items)

    def _rewards(self, states: Sequence[Tensor], made: Pack, items: Sequence[Rendered]) -> Tensor:
        prompt, completion = made.masks(items, self._device)
        pooling = self._network.pooling
        pooled = torch.cat([pool_packed(layer, prompt | completion, completion, pooling) for layer in states], dim=-1)
        head = self._network.head
        if not isinstance(head, PromptGated):
            return self._network.apply_heads(pooled, None)
        prompt = without_heading(prompt, head.heading)
        asked = pool_packed(states[-1], prompt, prompt, ("last", "mean"))
        return self._network.apply_heads(pooled, torch.where(prompt.any(dim=1, keepdim=True), asked, 0.0))


def by_prefix(items: Sequence[Rendered]) -> list[list[int]]:
    """Indices of the items of each request."""
    requests: dict[SharedPrefix | None, list[int]] = {}
    for index, item in enumerate(items):
        requests.setdefault(item.prefix, []).append(index)
    return list(requests.values())


def find_way(
    network: PooledRewardModel, renderer: Renderer, device: torch.device, *, cache_tokens: int
) -> SharedPrefixModel | None:
    """The fastest way that gives three texts the rewards of plain passes; None where neither does."""
    config = cast(Any, network.backbone).config
    if renderer.template == "pair" or _rotates_by_length(config):
        return None
    texts = [renderer.render(_PROMPT, [{"role": "assistant", "content": text}]) for text in _ANSWERS]
    items = share_prefix(texts)
    if items[0].prefix is None:
        return None
    with torch.inference_mode():
        plain = torch.cat([network(collate([item], device), by_head=True) for item in items])
    ways: tuple[Way, ...] = ("packed", "expanded")
    for way in ways:
        model = SharedPrefixModel(network, device, way, max_length=renderer.max_length, cache_tokens=cache_tokens)
        try:
            # Twice: the second time a packed prefix is remembered.
            agrees = all(_close(model.raw_rewards(items, by_head=True), plain, network) for _ in range(2))
        except Exception as error:
            # Whatever a model of others does with what it is given: it means that this way is closed.
            logger.info("sharing prefixes, %s: not with this model: %s: %s", way, type(error).__name__, error)
            continue
        if agrees:
            return SharedPrefixModel(network, device, way, max_length=renderer.max_length, cache_tokens=cache_tokens)
        logger.info("sharing prefixes, %s: not with this model: it changes rewards", way)
    return None


_PROMPT: list[Message] = [
    {
        "role": "user",
        "content": "Why is the sky blue in the daytime, and red in the evening? Explain it to a child of ten.",
    }
]
_ANSWERS = (
    "Air scatters blue light more than red light.",
    "I do not know.",
    "Sunlight holds all colours. In the daytime the blue ones are scattered all over the sky; in the evening light "
    "takes a longer way through the air, most of the blue is gone, and the red is left.",
)


def _close(rewards: Tensor, plain: Tensor, network: PooledRewardModel) -> bool:
    exact = next(network.backbone.parameters()).dtype == torch.float32
    tolerance = TOLERANCE if exact else HALF_PRECISION_TOLERANCE
    return bool(((rewards - plain).abs() <= tolerance * plain.abs().clamp(min=1)).all())


def _rotates_by_length(config: Any) -> bool:
    """Whether longer inputs have other position codes: a prefix then depends on what follows it."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {parameters.get("rope_type")} | {v.get("rope_type") for v in parameters.values() if isinstance(v, dict)}
    return bool(kinds & {"dynamic", "longrope"})


@contextmanager
def _attention(backbone: Any, name: str) -> Iterator[None]:
    """The backbone with another of the registered attention functions."""
    before = backbone.config._attn_implementation
    backbone.config._attn_implementation = name
    try:
        yield
    finally:
        backbone.config._attn_implementation = before
