"""Language models made ready for training, as policies: loaded whole or with adapters, and saved to be served.

What training needs to know beside the weights goes with them: the tokenizer, how messages become text, and the tokens
that end an answer.
"""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from reward.bases import adapter_base, quiet_loading, resolve_base
from reward.errors import InputError
from reward.rendering import Renderer
from training.distributed import scattered
from training.options import LoraOptions, OptionsError, PolicyOptions

Tuning = Literal["full", "lora", "frozen"]

ADAPTER = "default"

PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
"""For tokenizers without one; saved with the policy, so that serving asks as training did."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A causal language model to be trained, compared with or sampled from."""

    model: Any
    """A transformers model, or PEFT's wrapper around one."""
    tokenizer: Any
    renderer: Renderer
    base: str
    """What the weights were loaded from, as the user wrote it; an adapter's folder names it."""
    stop_ids: frozenset[int]
    """Tokens that end an answer."""
    merged: bool = False
    """The base holds an adapter already, merged: it lies nowhere on disk, and the policy can only be saved whole."""

    @property
    def has_adapter(self) -> bool:
        """Whether the trained weights are adapters, so that the base is the policy as it was before training."""
        return hasattr(self.model, "peft_config")

    @property
    def plain(self) -> Any:
        """The transformers model itself, adapters in place."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def max_length(self) -> int:
        """Tokens of a conversation: as asked for, or as many as the model takes."""
        return self.renderer.max_length

    @property
    def pad_id(self) -> int:
        """What rows are filled up with. No mask is ever made from it: it may be a token that means something."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else min(self.stop_ids)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The policy as it was before training, on the same weights: adapters are off inside."""
        assert self.has_adapter, "only adapters can be switched off"
        with self.model.disable_adapter():
            yield

    def trainable_state(self) -> dict[str, Tensor]:
        """Parameters that training changes, by name."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `trainable_state` gave."""
        put_weights(self.model, state)


def load_policy(
    name: str,
    *,
    tuning: Tuning,
    lora: LoraOptions | None = None,
    max_length: int = 1024,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> Policy:
    """A policy from a Hugging Face folder, a hub id, a folder of a PEFT adapter, or `package:NAME`.

    `tuning`: which weights will get gradients; `frozen` none, as a reference. An adapter's folder is merged into its
    base, so that a reference with adapters off is that policy and not the base below it. `max_length`: tokens of a
    conversation. Raises `OptionsError`, `reward.errors.ModelLoadError`.
    """
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = resolve_base(name)
    adapter = adapter_base(source)
    home = resolve_base(adapter) if adapter is not None else source
    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(
                source if _has_tokenizer(source) or adapter is None else home, trust_remote_code=trust_remote_code
            )
            model, found = AutoModelForCausalLM.from_pretrained(
                home,
                config=_without_dropout(AutoConfig.from_pretrained(home, trust_remote_code=trust_remote_code)),
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
            if adapter is not None:
                model = PeftModel.from_pretrained(model, source).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise OptionsError(f"base: cannot load a language model from {name!r}: {error}") from error
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise OptionsError(f"base: {name!r} does not hold {missing}: these weights would be random")
    if not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise OptionsError(f"base: the tokenizer of {name!r} has no token that ends an answer (eos_token)")
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    try:
        renderer = Renderer(tokenizer, "chat", min(max_length, _max_positions(model.config)))
    except InputError as error:
        raise OptionsError(f"base: {name!r}: {error}") from error
    model.config.use_cache = False
    stop_ids = _stop_ids(model, tokenizer)
    model.requires_grad_(tuning == "full")
    if tuning == "lora":
        model = _with_adapter(model, lora or LoraOptions(), name)
    if gradient_checkpointing:
        _recompute_activations(model)
    model.train(tuning != "frozen")
    return Policy(model, tokenizer, renderer, name, stop_ids, merged=adapter is not None)


def load_policy_for(options: PolicyOptions) -> Policy:
    """The policy that a trainer's options ask for. Raises as `load_policy` does."""
    return load_policy(
        options.base,
        tuning=options.tuning,
        lora=options.lora,
        max_length=options.max_length,
        gradient_checkpointing=options.gradient_checkpointing,
        trust_remote_code=options.trust_remote_code,
    )


def save_policy(
    policy: Policy, target: Path, *, merge: bool = False, trainable: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the policy to `target`, which appears only when whole and must not be there yet.

    With an adapter: PEFT's folder that names its base, or, to `merge`, the whole model. Tokenizer, chat template and
    the tokens that end an answer go with it. `trainable`: other weights in place of those in the model, by name, as
    `Policy.trainable_state` gives them.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    model = policy.model
    if trainable is not None:
        model = copy.deepcopy(model)
        put_weights(model, trainable)
    if policy.has_adapter and (merge or policy.merged):
        model = (copy.deepcopy(model) if trainable is None else model).merge_and_unload()
    try:
        with quiet_loading():
            _save_model(model, policy, partial)
            policy.tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_weights(model: Any, state: Mapping[str, Tensor]) -> None:
    """Puts weights, whole and by name, in place of those in the model, whole or in shards."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(scattered(value, parameters[name]))


def _save_model(model: Any, policy: Policy, folder: Path) -> None:
    is_adapter = hasattr(model, "peft_config")
    plain = model.get_base_model() if is_adapter else model
    settings = copy.deepcopy(plain.generation_config)
    settings.eos_token_id = sorted(policy.stop_ids)
    settings.pad_token_id = policy.pad_id
    settings.use_cache = True
    # A sampling default without `do_sample` is what transformers refuses to save.
    settings.do_sample = settings.do_sample or settings.temperature not in (None, 1.0) or settings.top_p is not None
    if is_adapter:
        # PEFT would look for the base's vocabulary, to see whether its embeddings were changed; ours never are.
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        plain.config.use_cache = True
        plain.save_pretrained(folder)
        plain.config.use_cache = False
    settings.save_pretrained(folder)


def _without_dropout(config: Any) -> Any:
    """The same model in training as in use: what a policy is compared with has no dropout either."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)
    return config


def _max_positions(config: Any) -> int:
    """Of what the model was made for; some name no end."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)


def _has_tokenizer(source: str) -> bool:
    return (Path(source) / "tokenizer_config.json").is_file()


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Chat checkpoints name several (end of turn, end of text), and not all of them in one place."""
    ids: set[int] = set()
    for named in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        if named is not None:
            ids.update([named] if isinstance(named, int) else named)
    if (turn_end := _turn_end(tokenizer)) is not None:
        ids.add(turn_end)
    if not ids:
        raise OptionsError("base: neither the model nor its tokenizer names a token that ends an answer")
    return frozenset(ids)


def _turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template puts behind an answer, where it does."""
    from jinja2.exceptions import TemplateError

    answer = "winnow"
    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}], tokenize=False
        )
    except (TemplateError, TypeError, KeyError):
        return None  # A template that wants more says so where messages are encoded.
    behind = text[text.rfind(answer) + len(answer) :].lstrip()
    first: list[int] = tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return first[0] if first and first[0] in special else None


def _with_adapter(model: Any, lora: LoraOptions, base: str) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        # GPT-2's linear layers, which keep their weights transposed.
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    with quiet_loading():
        adapted = get_peft_model(model, config)
    # Recorded as the user wrote it: the folder of a packaged base lies in this machine's cache.
    cast(Any, adapted).peft_config[ADAPTER].base_model_name_or_path = base
    return adapted


def _recompute_activations(model: Any) -> None:
    # transformers has renamed it: the old name warns, the new one is missing in its first 5.x versions.
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    enable = getattr(plain, "activation_checkpointing_enable", None) or plain.gradient_checkpointing_enable
    enable({"use_reentrant": False})
