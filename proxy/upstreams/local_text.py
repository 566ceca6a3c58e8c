"""From token ids to text, one token at a time: whole code points, stop strings, the bytes of a token. No torch.

Text is given out only when no later token can change it or turn it into part of a stop string.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_REPLACEMENT = "\ufffd"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token, its log-probability under the model's raw distribution, and the likeliest tokens in its place."""

    token_id: int
    logprob: float | None
    """None for the first token of an echoed prompt, which nothing predicts."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), likeliest first."""
    offset: int = 0
    """Characters of the text before this token."""


class CompletionText:
    """The text of one completion as it grows. `release` gives what is new and final since the last call."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._ids: list[int] = []
        # Decoding restarts at `_window`, a little before what is already text: some decoders treat the first
        # token of a text differently (a leading space), so a token must be decoded behind its neighbour.
        self._window = 0
        self._read = 0
        self._text = ""
        self._released = 0
        self._tokens: list[TokenLogprob] = []
        self._released_tokens = 0
        self.stopped = False
        """A stop string was met; the text ends just before it and takes no more tokens."""

    @property
    def text(self) -> str:
        return self._text

    def append(self, token_id: int, logprob: TokenLogprob | None = None) -> bool:
        """Adds a token; True when the text now contains a stop string. `logprob` is given out with its text."""
        assert not self.stopped
        start = len(self._text)
        self._ids.append(token_id)
        if logprob is not None:
            self._tokens.append(TokenLogprob(token_id, logprob.logprob, logprob.top, start))
        before = self._decode(self._ids[self._window : self._read])
        after = self._decode(self._ids[self._window :])
        # A trailing replacement character is half a code point: its other bytes are still to come.
        if len(after) > len(before) and not after.endswith(_REPLACEMENT):
            self._window, self._read = self._read, len(self._ids)
            self._extend(after[len(before) :])
        return self.stopped

    def finish(self) -> bool:
        """No token will follow: what was held back becomes text. True when that completes a stop string."""
        if not self.stopped and self._read < len(self._ids):
            before = self._decode(self._ids[self._window : self._read])
            after = self._decode(self._ids[self._window :])
            self._read = len(self._ids)
            self._extend(after[len(before) :])
        return self.stopped

    def release(self, *, final: bool = False) -> tuple[str, tuple[TokenLogprob, ...]]:
        """New text that can no longer change, with the log-probabilities of its tokens. `final` holds nothing back."""
        end = len(self._text) if final or self.stopped else len(self._text) - self._possible_stop()
        # What ends with the beginning of a stop was held, so neither a cut nor a longer hold goes behind `_released`.
        text = self._text[self._released : end]
        self._released = end
        last = len(self._tokens)
        if not final or self.stopped:
            last = self._released_tokens
            while last < len(self._tokens) and self._tokens[last].offset < end:
                last += 1
        tokens = tuple(self._tokens[self._released_tokens : last])
        self._released_tokens = last
        return text, tokens

    def _extend(self, new: str) -> None:
        searched = max(0, len(self._text) - max(map(len, self._stops), default=1) + 1)
        self._text += new
        found = [at for stop in self._stops if (at := self._text.find(stop, searched)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True

    def _possible_stop(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(len(self._text), max(map(len, self._stops), default=1) - 1), 0, -1):
            ending = self._text[-length:]
            if any(stop.startswith(ending) for stop in self._stops):
                return length
        return 0


class Vocabulary:
    """Single tokens of a tokenizer as text and bytes, for log-probabilities."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion: no special tokens, no tidying of spaces."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def is_special(self, token_id: int) -> bool:
        """Left out of texts."""
        return token_id in self._special

    def text(self, token_id: int) -> str:
        """A token by itself; bytes that are no whole code point are spelled out, as in `\\xe2\\x80`."""
        return self.token_bytes(token_id).decode("utf-8", errors="backslashreplace")

    def token_bytes(self, token_id: int) -> bytes:
        """Exactly what the token adds to a text."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):
            return b""  # an id the model has an output for and the tokenizer no name
        if token_id in self._special:
            return piece.encode()
        if self._is_byte_level:
            table = self._byte_of_character
            if all(character in table for character in piece):
                return bytes(table[character] for character in piece)
            return piece.encode()  # an added token: stored as plain text
        if byte := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("▁", " ").encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return backend is not None and "ByteLevel" in repr(backend.decoder)

    @cached_property
    def _byte_of_character(self) -> dict[str, int]:
        # GPT-2's alphabet: bytes that print stand for themselves, the others for the characters from U+0100 on.
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(0x100) if byte not in set(printable)]
        return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
