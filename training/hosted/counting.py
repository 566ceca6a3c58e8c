"""How many tokens a conversation has: counted with a tokenizer, or estimated from its bytes.

Hosted tokenizers are downloaded by their own libraries, which is not ours to do unasked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from training.hosted.options import HostedOptions
from training.options import OptionsError

MESSAGE_TOKENS = 4
"""What a message costs beside its text: its role and its marks, in ChatML and OpenAI's format alike."""

Counter = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None], int]
"""Tokens of messages, and of the tools that stand beside them, if any."""


def token_counter(options: HostedOptions) -> Counter:
    """Messages to tokens. Raises `OptionsError` where the tokenizer cannot be loaded."""
    count_text = _tokenizer(options.tokenizer) if options.tokenizer else _estimate(options.bytes_per_token)

    def count(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> int:
        told = count_text(json.dumps(tools, ensure_ascii=False)) + MESSAGE_TOKENS if tools else 0
        return told + sum(count_text(_words(message)) + MESSAGE_TOKENS for message in messages)

    return count


def _words(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    return (message.get("content") or "") + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _estimate(bytes_per_token: float) -> Callable[[str], int]:
    return lambda text: -int(-len(text.encode()) // bytes_per_token)


def _tokenizer(name: str) -> Callable[[str], int]:
    try:
        from transformers import AutoTokenizer

        from reward.bases import quiet_loading, resolve_base
        from reward.errors import RewardError
    except ModuleNotFoundError as error:
        raise OptionsError(f"tokenizer: counting needs {error.name}: install winnow[reward]") from error
    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(resolve_base(name))
    except (OSError, ValueError, RewardError) as error:
        raise OptionsError(f"tokenizer: cannot load {name}: {error}") from error
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)
