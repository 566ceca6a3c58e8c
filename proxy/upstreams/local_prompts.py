"""From a parsed request to the ids the model reads: chat template, beginning of text, context length. No torch."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from proxy.upstreams.local_requests import GenerationRequest, RequestError
from proxy.upstreams.local_text import Vocabulary


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One prompt as the model reads it, and how many tokens may follow."""

    text: str
    """What `echo` repeats; of a chat the rendered template."""
    token_ids: tuple[int, ...]
    max_tokens: int


class PromptEncoder:
    """Renders and tokenises for one model. Safe to use from several threads."""

    def __init__(
        self, tokenizer: Any, vocabulary: Vocabulary, *, vocab_size: int, max_positions: int, max_new_tokens: int
    ) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._max_positions = max_positions
        self._max_new_tokens = max_new_tokens

    def encode(self, request: GenerationRequest) -> tuple[EncodedPrompt, ...]:
        """Raises `RequestError` for what this model cannot render or has no room for."""
        unknown = [token for token in request.sampling.logit_bias or () if token >= self._vocab_size]
        if unknown:
            raise RequestError(
                f"Invalid value for 'logit_bias': token {unknown[0]} is not in the vocabulary of {self._vocab_size}",
                param="logit_bias",
            )
        if request.messages is not None:
            text = self._render(request)
            # The template has written every special token already, the beginning of the text included.
            return (self._fitted(request, text, self._tokenize(text, add_special_tokens=False)),)
        return tuple(self._encode_legacy(request, prompt) for prompt in request.prompts)

    def prompt_offsets(self, token_ids: Sequence[int]) -> list[int]:
        """For each token, how many characters of the prompt's text stand before it."""
        offsets, length = [], 0
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        for token_id in token_ids:
            offsets.append(length)
            if not self._vocabulary.is_special(token_id):
                length += len(decoder.decode(self._vocabulary.token_bytes(token_id)))
        return offsets

    def _render(self, request: GenerationRequest) -> str:
        import jinja2  # comes with the extra that brings the tokenizer

        if not self._tokenizer.chat_template:
            raise RequestError(
                "This model has no chat template: it completes texts (/completions) and does not chat", param="messages"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                list(request.messages or ()), tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise RequestError(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        assert isinstance(text, str)
        return text

    def _encode_legacy(self, request: GenerationRequest, prompt: str | tuple[int, ...]) -> EncodedPrompt:
        if isinstance(prompt, str):
            token_ids = self._tokenize(prompt, add_special_tokens=True)
            if not token_ids and self._tokenizer.bos_token_id is not None:
                token_ids = (self._tokenizer.bos_token_id,)
            if not token_ids:
                raise RequestError(
                    "Invalid value for 'prompt': is empty, and this model needs a beginning", param="prompt"
                )
            return self._fitted(request, prompt, token_ids)
        unknown = [token for token in prompt if not 0 <= token < self._vocab_size]
        if unknown:
            raise RequestError(
                f"Invalid value for 'prompt': token {unknown[0]} is not in the vocabulary of {self._vocab_size}",
                param="prompt",
            )
        return self._fitted(request, self._vocabulary.decode(prompt), prompt)

    def _tokenize(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _fitted(self, request: GenerationRequest, text: str, token_ids: tuple[int, ...]) -> EncodedPrompt:
        param = "messages" if request.chat else "prompt"
        length, room = len(token_ids), self._max_positions - len(token_ids)
        limit = min(self._max_new_tokens, room) if request.max_tokens is None else request.max_tokens
        if limit > room or room < (1 if request.max_tokens is None else 0):
            asked = "" if request.max_tokens is None else f" and {limit} in the completion"
            raise RequestError(
                f"This model's maximum context length is {self._max_positions} tokens. However, you requested "
                f"{length} tokens in the {param}{asked}. Please reduce the length of the {param} or completion.",
                param=param,
                code="context_length_exceeded",
            )
        return EncodedPrompt(text, token_ids, limit)
