"""Tiny models with random weights that lie on disk as published reward models do. Names of files, tensors and members
of config.json are the originals'; sizes are not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from tests.fakes.models import BEGIN, END, build_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15}


def build_openassistant_deberta(path: Path) -> Path:
    """OpenAssistant/reward-model-deberta-v3: an encoder that was given the question and the answer as a pair."""
    tokenizer = build_tokenizer(chat_template=False)
    begin, end = tokenizer.convert_tokens_to_ids([BEGIN, END])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}",
        pair=f"{BEGIN} $A {END} $B:1 {END}:1",
        special_tokens=[(BEGIN, begin), (END, end)],
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    config = DebertaV2Config(
        **SIZES,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=0.15,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=64,
        max_relative_positions=-1,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        type_vocab_size=0,
        pooler_hidden_act="gelu",
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    return _save(_made(DebertaV2ForSequenceClassification, config), tokenizer, path)


def build_skywork_qwen3(path: Path) -> Path:
    """Skywork-Reward-V2-Qwen3: bf16 on disk, embeddings tied in the config, heads of a width of their own."""
    tokenizer = build_tokenizer(adds_begin=False)
    config = Qwen3Config(
        **DECODER, **_tokens(tokenizer), head_dim=16, tie_word_embeddings=True, use_cache=False, num_labels=1
    )
    return _save(_made(Qwen3ForSequenceClassification, config).to(torch.bfloat16), tokenizer, path)


def build_skywork_llama(path: Path) -> Path:
    """Skywork-Reward-V2-Llama-3: its chat template writes the BOS that its tokenizer would add once more."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(**DECODER, **_tokens(tokenizer), num_labels=1)
    return _save(_made(LlamaForSequenceClassification, config).to(torch.bfloat16), tokenizer, path)


def build_grm(path: Path, *, layers: int = 1) -> Path:
    """Ray2333/GRM-*-sftreg: a language model with `v_head.summary`, which `layers` hidden ones make an MLP."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(**DECODER, **_tokens(tokenizer))
    base = _made(LlamaForCausalLM, config)
    torch.manual_seed(1)
    head: dict[str, Tensor] = {}
    width = config.hidden_size
    for number in range(layers):
        head |= {f"{2 * number}.weight": torch.randn(24, width) / 4, f"{2 * number}.bias": torch.randn(24)}
        width = 24
    last = f"{2 * layers}." if layers else ""
    head |= {f"{last}weight": torch.randn(1, width), f"{last}bias": torch.randn(1)}
    return _save_with(base, tokenizer, path, {f"v_head.summary.{name}": tensor for name, tensor in head.items()})


def build_armorm(path: Path) -> Path:
    """RLHFlow/ArmoRM-Llama3: a head for 19 objectives, a gate on the prompt, and code of its own."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(**DECODER, **_tokens(tokenizer), num_labels=1)
    code = {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"}
    objectives, hidden = 19, 16
    torch.manual_seed(2)
    tensors = {
        "regression_layer.weight": torch.randn(objectives, config.hidden_size),
        "reward_transform_matrix": torch.eye(objectives) + torch.randn(objectives, objectives) / 9,
        "gating.logit_scale": torch.full((1,), 1.5),
        "gating.layers.0.weight": torch.randn(hidden, config.hidden_size),
        "gating.layers.0.bias": torch.zeros(hidden),
        "gating.layers.1.weight": torch.randn(objectives, hidden) * 9,
        "gating.layers.1.bias": torch.randn(objectives),
    }
    _save_with(_made(LlamaForCausalLM, config), tokenizer, path, tensors)
    settings = path / "config.json"
    more = {"architectures": ["LlamaForRewardModelWithGating"], "auto_map": code, "num_objectives": objectives}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | more))
    (path / "modeling_custom.py").write_text("raise RuntimeError('code of others ran')\n")
    return path


def build_pickled(path: Path) -> Path:
    """As many older models are published."""
    build_skywork_llama(path)
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")
    return path


def _made(kind: Any, config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: PreTrainedModel = kind(config)
    return made.eval()


def _tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _save_with(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path, more: Mapping[str, Tensor]
) -> Path:
    """In two files with an index, as models of billions of weights are; the second holds the head."""
    _save(model, tokenizer, path)
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    save_file(dict(more), path / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    places = dict.fromkeys(model.state_dict(), "model-00001-of-00002.safetensors")
    places |= dict.fromkeys(more, "model-00002-of-00002.safetensors")
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path
