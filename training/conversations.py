"""Messages -> token ids of a policy, with a mark on every token that the policy is to write itself.

The one place where text becomes ids in the training of policies, so that demonstrations, preferences, rollouts and
samples cannot differ in it. The chat template is rendered once and tokenised once (no second BOS); messages are
prepared as for reward models (`reward/rendering.py`). What counts of an assistant's turn is all from behind its heading
up to and with the token that ends the turn (EOS): by position, never by `ids != pad`, since both may be one token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from feedback.records import Messages
from reward.errors import InputError
from training.policies import Policy

PROMPT_SHARE = 0.25
"""A long completion leaves at least this share of `max_length` to its prompt."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation as ids."""

    ids: list[int]
    completion_mask: list[bool]
    """True where the policy is to write the token itself. At least one is; the first token never is."""
    prompt_length: int
    """Tokens before the last turn that counts."""
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens that count."""
        return sum(self.completion_mask)


def encode_prompt(policy: Policy, messages: Messages) -> list[int]:
    """What the policy is given to answer: the messages with the heading of its own turn. Raises `InputError`."""
    text = _templated(policy, policy.renderer.normalised(messages), heading=True)
    ids: list[int] = _encoded(policy, text)["input_ids"]
    return ids


def encode_conversation(
    policy: Policy, prompt: Messages, completion: Messages, *, every_turn: bool = False
) -> Conversation:
    """A prompt with its completion. Not cut to length: see `fitted`.

    The assistant's messages in `completion` count, and those in `prompt` too with `every_turn`. Raises `InputError`.
    """
    messages = policy.renderer.normalised([*prompt, *completion])
    wanted = [
        place
        for place, message in enumerate(messages)
        if message["role"] == "assistant" and (every_turn or place >= len(prompt))
    ]
    if not wanted:
        raise InputError("no message of the assistant's to learn from")
    text = _templated(policy, messages)
    encoded = _encoded(policy, text)
    ids: list[int] = list(encoded["input_ids"])
    # Tokens that a tokenizer adds have the offsets (0, 0): running maxima keep both lists sorted.
    starts, ends = (
        _rising([start for start, _ in encoded["offset_mapping"]]),
        _rising([end for _, end in encoded["offset_mapping"]]),
    )
    mask = [False] * len(ids)
    first = 0
    for place in wanted:
        begin = _shared_length(_templated(policy, messages[:place], heading=True), text)
        # Some templates drop things from a turn once others follow; what is shared is right for all.
        end = _shared_length(_templated(policy, messages[: place + 1]), text)
        first = bisect_left(ends, begin + 1)  # the first token that reaches past the heading
        last = bisect_left(starts, end)  # one behind the last that begins in the turn
        stop = next((at for at in range(first, last) if ids[at] in policy.stop_ids), None)
        if stop is None and place == len(messages) - 1:
            # The template leaves the end of a turn to the reader: training has to say it.
            last = len(ids)
            ids.append(_end_of_text(policy))
            mask.append(False)
            stop = last
        kept = last if stop is None else stop + 1
        mask[first:kept] = [True] * (kept - first)
    mask[0] = False  # nothing comes before it to foretell it from
    if not any(mask):
        raise InputError("the chat template leaves nothing of the assistant's turn")
    # What the template puts behind the last counted token teaches nothing.
    length = len(mask) - mask[::-1].index(True)
    return Conversation(ids[:length], mask[:length], first)


def fitted(policy: Policy, conversations: Sequence[Conversation], max_length: int) -> list[Conversation]:
    """Conversations that share their prompt, cut to `max_length` tokens, all of them at the same place of the prompt.

    The prompt loses its beginning, a BOS aside; a completion that leaves it less than `PROMPT_SHARE` loses its end, and
    with it the token that would have taught where to stop.
    """
    if all(len(one) <= max_length for one in conversations):
        return list(conversations)
    prompt = min(one.prompt_length for one in conversations)
    longest = max(len(one) - one.prompt_length for one in conversations)
    room = max(max_length - longest, min(prompt, int(max_length * PROMPT_SHARE)))
    begin = policy.tokenizer.bos_token_id
    return [_cut(one, min(room, one.prompt_length), max_length, begin) for one in conversations]


def _cut(one: Conversation, room: int, max_length: int, begin: int | None) -> Conversation:
    start = one.prompt_length - room
    ids = one.ids[start : start + max_length]
    mask = one.completion_mask[start : start + max_length]
    mask[0] = False
    if begin is not None and one.ids[0] == begin and room > 1:
        ids[0] = begin
    return Conversation(ids, mask, room, truncated=start > 0 or len(one) > start + max_length)


def _templated(policy: Policy, messages: list[dict[str, Any]], *, heading: bool = False) -> str:
    from jinja2.exceptions import TemplateError

    try:
        text: str = policy.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=heading)
    except (TemplateError, TypeError, KeyError) as error:
        raise InputError(f"the policy's chat template refuses these messages: {error}") from error
    return text


def _encoded(policy: Policy, text: str) -> Any:
    try:
        # The template has written every special token already, the beginning of the text included.
        return policy.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except TypeError as error:
        raise InputError("a text holds half of a surrogate pair: it is not valid Unicode") from error


def _end_of_text(policy: Policy) -> int:
    end = policy.tokenizer.eos_token_id
    return int(end) if end is not None else min(policy.stop_ids)


def _rising(numbers: Sequence[int]) -> list[int]:
    rising: list[int] = []
    for number in numbers:
        rising.append(max(number, rising[-1] if rising else 0))
    return rising


def _shared_length(a: str, b: str) -> int:
    """Characters that two texts have in common from their start."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), min(len(a), len(b)))
