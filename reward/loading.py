"""From files to networks. Four layouts on disk load to one class (see docs/decisions/0001-pooled-head.md):

* a one-label `AutoModelForSequenceClassification` folder or hub id, encoder or decoder;
* a PEFT adapter of one, naming its base;
* a decoder with a value head (`v_head.summary`), as GRM is published;
* a base (referenced, not copied) with a head of ours and optionally a LoRA adapter, as `reward.json` says.

Others are refused by the names of their tensors: transformers would load the base of most, and make up a head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from reward.armorm import ArmoHead, temperature_of
from reward.bases import resolve_base
from reward.errors import ModelLoadError
from reward.layouts import Layout, find_layout, read_armo_head, read_value_head
from reward.manifest import Head, Manifest
from reward.network import (
    ClassifierRewardModel,
    PooledRewardModel,
    build_head,
    hidden_size,
    load_backbone,
    wrap_classifier,
)
from reward.rendering import turn_heading

HEAD_FILE = "head.safetensors"


@dataclass(frozen=True, slots=True)
class Loading:
    """The three ways in, with the choices they share."""

    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool

    def _arguments(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "use_safetensors": True, "trust_remote_code": self.trust_remote_code}

    def pooled(self, folder: Path, manifest: Manifest) -> tuple[PooledRewardModel, Any]:
        from peft import PeftModel
        from safetensors.torch import load_file

        base = resolve_base(manifest.base)
        backbone = load_backbone(base, manifest.head, **self._arguments())
        if (folder / "adapter_config.json").is_file():
            # Merged: scoring then costs what the bare base costs.
            backbone = PeftModel.from_pretrained(backbone, str(folder)).merge_and_unload()
        head_file = folder / HEAD_FILE
        if not head_file.is_file():
            raise ModelLoadError(f"{head_file} is missing: the reward head was not saved with this model")
        head = build_head(hidden_size(backbone), manifest.head)
        try:
            head.load_state_dict(load_file(head_file))
        except RuntimeError as error:
            raise ModelLoadError(f"{head_file} does not hold this head: {error}") from error
        tokenizer_home = str(folder) if (folder / "tokenizer_config.json").is_file() else base
        network = PooledRewardModel(backbone, head, manifest.head.pooling, manifest.head.layers)
        return network, self._tokenizer(tokenizer_home)

    def sequence_classification(
        self, name: str, num_layers: int | None
    ) -> tuple[PooledRewardModel | ClassifierRewardModel, Any]:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        adapter = _adapter_config(name)
        layout = "classifier" if adapter is not None else find_layout(name)
        if layout != "classifier":
            tokenizer = self._tokenizer(name)
            return self._published(name, layout, tokenizer), tokenizer
        if adapter is not None:
            classifier = self._adapter_classifier(name, adapter, num_layers)
        else:
            config = AutoConfig.from_pretrained(name, trust_remote_code=self.trust_remote_code)
            if config.num_labels != 1:
                raise ModelLoadError(
                    f"{name} has {config.num_labels} labels; a reward model has one (config.json: id2label)"
                )
            classifier, info = AutoModelForSequenceClassification.from_pretrained(
                name, output_loading_info=True, **self._arguments()
            )
            missing = sorted(info["missing_keys"])
            if missing:
                raise ModelLoadError(
                    f"{name} does not hold {', '.join(missing)}: the head would be random. Save the model with its "
                    "classification head (PEFT: task_type SEQ_CLS)"
                )
        # An adapter may have been saved without a tokenizer: the base's is meant.
        own = adapter is None or (Path(name) / "tokenizer_config.json").is_file()
        home = name if own else resolve_base(cast(dict[str, Any], adapter)["base_model_name_or_path"])
        return wrap_classifier(classifier), self._tokenizer(home)

    def _published(self, name: str, layout: Layout, tokenizer: Any) -> PooledRewardModel:
        # No code of theirs: bases are of kinds that transformers knows.
        backbone = load_backbone(name, Head(), dtype=self.dtype, use_safetensors=True)
        head: nn.Sequential | ArmoHead
        if layout == "value_head":
            head = read_value_head(name)
        else:
            heading = tokenizer(turn_heading(tokenizer), add_special_tokens=False)["input_ids"]
            head = read_armo_head(name, temperature_of(backbone.config), len(heading))
        return PooledRewardModel(backbone, head.to(self.dtype), ("last",))

    def _adapter_classifier(self, name: str, adapter: dict[str, Any], num_layers: int | None) -> nn.Module:
        from peft import PeftModel
        from safetensors import safe_open
        from transformers import AutoModelForSequenceClassification

        weights = Path(name) / "adapter_model.safetensors"
        if not weights.is_file():
            raise ModelLoadError(f"{weights} is missing (safetensors only)")
        with safe_open(weights, framework="pt") as file:
            if not any(".score." in key or ".classifier." in key for key in file.keys()):  # noqa: SIM118
                raise ModelLoadError(
                    f"{weights} holds no classification head: it would be random. Train with task_type SEQ_CLS"
                )
        base = adapter["base_model_name_or_path"]
        extra = {} if num_layers is None else {"num_hidden_layers": num_layers}
        model = AutoModelForSequenceClassification.from_pretrained(
            resolve_base(base), num_labels=1, **extra, **self._arguments()
        )
        merged: nn.Module = PeftModel.from_pretrained(model, name).merge_and_unload()
        return merged

    def _tokenizer(self, name: str) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name, trust_remote_code=self.trust_remote_code)


def _adapter_config(name: str) -> dict[str, Any] | None:
    path = Path(name) / "adapter_config.json"
    if not path.is_file():
        return None
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not config.get("base_model_name_or_path"):
        raise ModelLoadError(f"{path}: base_model_name_or_path is missing: the adapter does not say what it adapts")
    return config
