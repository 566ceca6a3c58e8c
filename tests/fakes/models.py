"""Tiny models with random weights, built from fixed seeds in a fraction of a second: nothing is downloaded.

Each builder writes an ordinary Hugging Face folder (config, safetensors, tokenizer, chat template) that
`from_pretrained` loads. The tokenizer is a byte-level BPE: any text, code points outside its vocabulary included,
goes through it and back unchanged, and one character may take several tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

Family = Literal["llama", "qwen2", "gpt2"]
EncoderFamily = Literal["bert", "roberta"]

END, START, PAD, BEGIN = "<|im_end|>", "<|im_start|>", "<|pad|>", "<|begin|>"
SPECIAL_TOKENS = [PAD, BEGIN, START, END]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is the capital of France.",
    "You are a helpful assistant. How can I help you today? Please answer the question as well as you can.",
    "system user assistant tool\n one two three four five six seven eight nine ten, a list of words and numbers: 1 2 3",
]

_CAUSAL: dict[str, Any] = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "gpt2": GPT2LMHeadModel}
_REWARD: dict[str, Any] = {
    "llama": LlamaForSequenceClassification,
    "qwen2": Qwen2ForSequenceClassification,
    "gpt2": GPT2ForSequenceClassification,
}
_ENCODERS: dict[str, tuple[Any, Any]] = {
    "bert": (BertConfig, BertForSequenceClassification),
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
}


def build_tokenizer(
    vocab_size: int = 400, *, chat_template: bool = True, adds_begin: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, all 256 bytes among them. `adds_begin`: texts start with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if adds_begin:
        begin_id = tokenizer.token_to_id(BEGIN)
        end_id = tokenizer.token_to_id(END)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A",
            pair=f"{BEGIN} $A {END} $B:1",
            special_tokens=[(BEGIN, begin_id), (END, end_id)],
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, additional_special_tokens=[START]
    )
    if chat_template:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_tiny_causal_lm(
    path: Path,
    *,
    family: Family = "llama",
    vocab_size: int = 400,
    max_positions: int = 512,
    chat_template: bool = True,
    seed: int = 0,
    spread: float = 0.15,
) -> Path:
    """A language model of some 50,000 weights in `path`. `spread`: deviation of the weights; more is less uniform."""
    tokenizer = build_tokenizer(vocab_size, chat_template=chat_template)
    config = _decoder_config(family, tokenizer, max_positions, spread)
    return _save(_CAUSAL[family], config, tokenizer, path, seed)


def build_tiny_reward_model(
    path: Path,
    *,
    family: Family = "llama",
    vocab_size: int = 400,
    max_positions: int = 512,
    chat_template: bool = True,
    seed: int = 0,
    spread: float = 0.15,
) -> Path:
    """A decoder with a one-label head in `path`: reads its last token that is no padding."""
    tokenizer = build_tokenizer(vocab_size, chat_template=chat_template)
    config = _decoder_config(family, tokenizer, max_positions, spread)
    config.num_labels = 1
    return _save(_REWARD[family], config, tokenizer, path, seed)


def build_tiny_encoder_reward_model(
    path: Path,
    *,
    family: EncoderFamily = "bert",
    vocab_size: int = 400,
    max_positions: int = 512,
    seed: int = 0,
    spread: float = 0.15,
) -> Path:
    """An encoder with a one-label head in `path`. Its tokenizer has no chat template; BERT's knows two segments."""
    tokenizer = build_tokenizer(vocab_size, chat_template=False)
    segments = ["token_type_ids"] if family == "bert" else []
    tokenizer.model_input_names = ["input_ids", *segments, "attention_mask"]
    config_class, model_class = _ENCODERS[family]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=max_positions,
        initializer_range=spread,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    return _save(model_class, config, tokenizer, path, seed)


def _decoder_config(family: Family, tokenizer: PreTrainedTokenizerFast, max_positions: int, spread: float) -> Any:
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "gpt2":
        return GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=max_positions, initializer_range=spread, **tokens)
    kind = LlamaConfig if family == "llama" else Qwen2Config
    return kind(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        initializer_range=spread,
        **tokens,
    )


def _save(kind: Any, config: Any, tokenizer: PreTrainedTokenizerFast, path: Path, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = kind(config)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
