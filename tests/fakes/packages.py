"""Installed Python packages that carry a model, made up on the spot: nothing is downloaded or installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import AutoModelForCausalLM

_CONTROL, _NORMAL = 3, 1
"""GGUF's kinds of tokens."""


def install_package(site: Path, name: str, files: dict[str, Path], version: str = "1.0") -> Path:
    """Puts `files` (name -> source) into a package below `site`, as pip would; `site` must be on `sys.path`."""
    folder = site / name.replace("-", "_")
    folder.mkdir(parents=True)
    for target, source in files.items():
        (folder / target).write_bytes(source.read_bytes())
    info = site / f"{folder.name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    record = [f"{folder.name}/{target},," for target in files] + [f"{info.name}/METADATA,,", f"{info.name}/RECORD,,"]
    (info / "RECORD").write_text("\n".join(record) + "\n", encoding="utf-8")
    return folder


def write_gguf(llama: Path, target: Path) -> Path:
    """The Llama language model and byte-level tokenizer of a Hugging Face folder as one GGUF file in fp32."""
    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    config = model.config
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, json.loads((llama / "tokenizer.json").read_text(encoding="utf-8")), config)
    writer.add_chat_template((llama / "chat_template.jinja").read_text(encoding="utf-8"))
    for name, weight in model.state_dict().items():
        writer.add_tensor(*_tensor(name, weight.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add_tokenizer(writer: Any, tokenizer: dict[str, Any], config: Any) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL if token in special else _NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_add_bos_token(False)


def _tensor(name: str, weight: np.ndarray[Any, np.dtype[np.float32]], config: Any) -> tuple[str, Any]:
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.": "blk.",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    # GGUF keeps the two halves of each rotary dimension side by side.
    if "q_proj" in name or "k_proj" in name:
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        rows, columns = weight.shape
        halves = weight.reshape(heads, 2, rows // heads // 2, columns)
        weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name, weight
