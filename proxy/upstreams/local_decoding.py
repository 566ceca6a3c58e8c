"""The language model as a machine that decodes: load, prefill, and one token more for every candidate in the batch.

Imports torch and transformers: import this only where a model is loaded. One thread uses it at a time.
Shapes: B candidates, T positions of the key-value cache, V vocabulary. Rows are padded on the left, so that the
newest position is the last of every row; masks are True where a position is real.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from reward.bases import adapter_base, quiet_loading, resolve_base
from reward.devices import choose_device, choose_dtype
from reward.errors import ModelLoadError

PREFILL_CHUNK = 512
"""Prompt tokens a forward: bounds the logits of an echoed prompt, and how long a cancelled prompt still runs."""


@dataclass(frozen=True)
class LanguageModel:
    """A loaded checkpoint with what serving it needs to know."""

    model: Any
    tokenizer: Any
    device: torch.device
    end_ids: frozenset[int]
    """Tokens that end an answer."""
    max_positions: int
    vocab_size: int
    fingerprint: str
    """Changes with the weights, the dtype or the libraries: equal seeds give equal texts within one."""


def load(name: str, *, device: str, dtype: str, trust_remote_code: bool) -> LanguageModel:
    """Loads a causal language model and runs it once. Slow: not for an event loop.

    A folder may hold a PEFT adapter that names its base: it is merged into it. Tokenizer, chat template and generation
    settings are the adapter's where it has its own.

    Raises `ModelLoadError`, and `reward.devices.DeviceError` for a device or dtype that does not exist.
    """
    place = choose_device(device)
    number_format = choose_dtype(dtype, place)
    source = resolve_base(name)
    adapted = adapter_base(source)
    base = source if adapted is None else resolve_base(adapted)
    own_tokenizer = adapted is None or (Path(source) / "tokenizer_config.json").is_file()
    try:
        with quiet_loading():
            config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(
                source if own_tokenizer else base, trust_remote_code=trust_remote_code
            )
            model, found = AutoModelForCausalLM.from_pretrained(
                base,
                config=config,
                dtype=number_format,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
            if adapted is not None:
                model = _merged(model, source)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(
            f"cannot load a causal language model from {name!r}: {error}. Name a folder or hub id with config.json, "
            "a tokenizer and safetensors weights, or a folder with a PEFT adapter of one"
        ) from error
    if found["missing_keys"]:
        # transformers fills the gaps with random numbers: the model would talk, and talk nonsense.
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise ModelLoadError(
            f"{name!r} is no complete causal language model: {len(found['missing_keys'])} of its weights are not in "
            f"the checkpoint ({missing})"
        )
    model.to(place).eval().requires_grad_(False)
    text_config = config.get_text_config()
    loaded = LanguageModel(
        model=model,
        tokenizer=tokenizer,
        device=place,
        end_ids=_end_ids(model, tokenizer),
        max_positions=_max_positions(text_config),
        vocab_size=int(text_config.vocab_size),
        fingerprint=_fingerprint(config, number_format, model),
    )
    _try_out(loaded, name)
    return loaded


class DecodeBatch:
    """The candidates being decoded together: their key-value cache and lengths. Rows keep their order."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._cache = DynamicCache()
        self._mask = torch.zeros(0, 0, dtype=torch.bool, device=model.device)  # (B, T)
        self._lengths: list[int] = []

    def __len__(self) -> int:
        return len(self._lengths)

    @classmethod
    def of_prompt(cls, model: LanguageModel, cache: DynamicCache, length: int, num_rows: int) -> DecodeBatch:
        """`num_rows` candidates that share one prefilled prompt. Takes over `cache`."""
        batch = cls(model)
        if num_rows > 1:
            cache.batch_repeat_interleave(num_rows)
        batch._cache = cache
        batch._mask = torch.ones(num_rows, length, dtype=torch.bool, device=model.device)
        batch._lengths = [length] * num_rows
        return batch

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Appends one token to each row and returns the logits of the next. (B, V)"""
        assert len(token_ids) == len(self)
        device = self._model.device
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=True)
        ragged = len(set(self._lengths)) > 1 or self._mask.shape[1] != self._lengths[0] + 1
        output = self._model.model(
            input_ids=torch.tensor([[token_id] for token_id in token_ids], device=device),
            position_ids=torch.tensor([[length] for length in self._lengths], device=device),
            # Without padding the kernels need no mask, and are faster for it.
            attention_mask=self._mask if ragged else None,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._lengths = [length + 1 for length in self._lengths]
        logits = output.logits[:, -1]
        assert isinstance(logits, torch.Tensor)
        return logits

    @torch.inference_mode()
    def merge(self, other: DecodeBatch) -> None:
        """Takes in the rows of `other`, behind its own."""
        if not len(self):
            self._cache, self._mask, self._lengths = other._cache, other._mask, other._lengths
            return
        width = max(self._mask.shape[1], other._mask.shape[1])
        for mine, theirs in zip(self._cache.layers, other._cache.layers, strict=True):
            if mine.is_initialized:
                mine.keys = torch.cat([_widened(mine.keys, width), _widened(theirs.keys, width)])
                mine.values = torch.cat([_widened(mine.values, width), _widened(theirs.values, width)])
        pads = [(width - part.shape[1], 0) for part in (self._mask, other._mask)]
        self._mask = torch.cat(
            [torch.nn.functional.pad(part, pad) for part, pad in zip((self._mask, other._mask), pads, strict=True)]
        )
        self._lengths = [*self._lengths, *other._lengths]

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Drops all but these rows, and the columns that then pad every one of them."""
        if len(rows) == len(self):
            return
        self._lengths = [self._lengths[row] for row in rows]
        if not rows:
            self._cache = DynamicCache()
            self._mask = self._mask[:0, :0]
            return
        index = torch.tensor(list(rows), device=self._model.device)
        surplus = self._mask.shape[1] - max(self._lengths)
        self._mask = self._mask[index, surplus:]
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.keys = layer.keys[index, :, surplus:]
                layer.values = layer.values[index, :, surplus:]


@dataclass(frozen=True)
class PrefillPart:
    """A piece of a prompt that went through the model. `logits` are those of its every position, or of its last."""

    logits: torch.Tensor  # (1, positions, V)
    start: int
    end: int


def prefill(
    model: LanguageModel, token_ids: Sequence[int], cache: DynamicCache, *, all_logits: bool = False
) -> Iterator[PrefillPart]:
    """Runs a prompt through the model into `cache`, a chunk at a time. Whoever iterates may stop between chunks."""
    for start in range(0, len(token_ids), PREFILL_CHUNK):
        chunk = token_ids[start : start + PREFILL_CHUNK]
        with torch.inference_mode():
            output = model.model(
                input_ids=torch.tensor([list(chunk)], device=model.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=0 if all_logits else 1,
            )
        yield PrefillPart(output.logits, start, start + len(chunk))


def _widened(states: torch.Tensor, width: int) -> torch.Tensor:
    """Keys or values (B, heads, T, size), padded on the left to `width` positions."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[2], 0))


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    # Chat checkpoints name several (end of turn, end of text), and not all of them in one place.
    ids: set[int] = set()
    for named in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        if named is not None:
            ids.update([named] if isinstance(named, int) else named)
    return frozenset(ids)


def _max_positions(config: Any) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(positions := getattr(config, name, None), int):
            return positions
    raise ModelLoadError(f"the configuration of this {config.model_type} model does not say how long a text may be")


def _merged(model: Any, folder: str) -> Any:
    """The model with the folder's adapter in its weights: it then costs what the bare base costs."""
    from peft import PeftModel

    merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    if (Path(folder) / GENERATION_CONFIG_NAME).is_file():
        # The tokens that end an answer may be others than the base's.
        merged.generation_config = GenerationConfig.from_pretrained(folder)
    return merged


def _fingerprint(config: Any, dtype: torch.dtype, model: Any) -> str:
    # Training changes every matrix a little: the beginning of each tells two checkpoints of one shape apart.
    weights = [parameter.flatten()[:16].tolist() for parameter in model.parameters()]
    facts = f"{config.to_json_string()} {weights} {dtype} {torch.__version__} {transformers.__version__}"
    return f"fp_{hashlib.sha256(facts.encode()).hexdigest()[:10]}"


def _try_out(model: LanguageModel, name: str) -> None:
    """Proves that the model keeps an ordinary key-value cache that rows can be added to and taken from."""
    cache = DynamicCache()
    token = min(model.end_ids, default=0)
    try:
        for _ in prefill(model, [token, token], cache):
            pass
        lengths = {layer.keys.shape[2] for layer in cache.layers if layer.is_initialized}
        if lengths != {2}:
            raise ValueError(f"its layers cached {sorted(lengths)} positions of 2")
        DecodeBatch.of_prompt(model, cache, 2, 2).step([token, token])
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ModelLoadError(
            f"{name!r} ({model.model.config.model_type}) cannot be decoded here: it keeps no key-value cache of the "
            f"ordinary kind ({error}). Serve it with an inference server and name that as the upstream"
        ) from error
