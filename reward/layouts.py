"""Published reward models that are no stock classifiers, told apart by the names of their tensors.

A value head is read as GRM (arXiv 2406.10216) stores it: `v_head.summary`, a linear layer or several with ReLU between,
on the last token's hidden state after the final norm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from safetensors import safe_open
from torch import Tensor, nn

from reward.errors import ModelLoadError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
VALUE_HEAD = "v_head.summary."

_FOREIGN: Mapping[str, str] = {
    "regression_layer.": "a regression head for several objectives, as ArmoRM and QRM have it",
    "v_head.": "a value head of another make, as InternLM2's and Athene's are",
    "value_head.": "a value head of another make",
    "out_proj.": "an output projection, as OpenAssistant's Pythia models have it",
    "score.0.": "a head of several layers, as INF-ORM has it",
    "rm_head.": "a head of its own make",
    "reward_head.": "a head of its own make",
}
"""What heads that are not read here begin with, the longer of two first."""


def has_value_head(name: str) -> bool:
    """Whether the folder or hub id holds a value head that can be read.

    Raises `ModelLoadError` for one that holds a head of another make, or pickled weights only.
    """
    tensors = _stored(name)
    if any(tensor.startswith(VALUE_HEAD) for tensor in tensors):
        return True
    for beginning, description in _FOREIGN.items():
        found = sorted(tensor for tensor in tensors if tensor.startswith(beginning))
        if found:
            raise ModelLoadError(
                f"{name} keeps its reward head in {found[0]}: {description}. It takes the model's own code to read. "
                "Serve it with that over HTTP and name the address by reward.url, or take a model with a one-label "
                "classifier or v_head.summary (docs/reward-models.md says which)"
            )
    if not tensors and any(_file(name, pickled) is not None for pickled in PICKLED):
        raise ModelLoadError(
            f"{name} has pickled weights only ({PICKLED[0]}), and reading those may run any code. Convert them once "
            "where you trust them: load it with AutoModelForSequenceClassification and save_pretrained, which writes "
            "safetensors"
        )
    return False


def read_value_head(name: str) -> nn.Sequential:
    """The value head of a model for which `has_value_head` holds. Raises `ModelLoadError` for one of an odd shape."""
    tensors = {}
    for tensor, shard in _stored(name).items():
        if tensor.startswith(VALUE_HEAD):
            file = _file(name, shard)
            if file is None:
                raise ModelLoadError(f"{name}: {shard} is missing, which holds {tensor}")
            with safe_open(file, framework="pt") as opened:
                tensors[tensor.removeprefix(VALUE_HEAD)] = opened.get_tensor(tensor)
    # Numbered as in a Sequential, the activations in between without weights; one layer alone has no number.
    places = sorted({int(tensor.split(".")[0]) for tensor in tensors if tensor.split(".")[0].isdigit()})
    if not places and "weight" in tensors:
        tensors = {f"0.{tensor}": value for tensor, value in tensors.items()}
        places = [0]
    layers: list[nn.Module] = []
    for place in places:
        layers += [*([nn.ReLU()] if layers else []), _linear(tensors, f"{place}.")]
    if not layers or cast(nn.Linear, layers[-1]).out_features != 1:
        raise ModelLoadError(f"{name}: {VALUE_HEAD}* gives no single number: {', '.join(sorted(tensors))}")
    return nn.Sequential(*layers)


def _linear(tensors: Mapping[str, Tensor], beginning: str) -> nn.Linear:
    weight, bias = tensors[f"{beginning}weight"], tensors.get(f"{beginning}bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer


def _stored(name: str) -> dict[str, str]:
    """Every tensor in safetensors of a folder or hub id, and the name of the file that holds it."""
    index = _file(name, INDEX)
    if index is not None:
        shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return shards
    weights = _file(name, WEIGHTS)
    if weights is None:
        return {}
    with safe_open(weights, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), WEIGHTS)


def _file(name: str, file: str) -> Path | None:
    """Where it lies on this machine; None where the folder or hub id has none."""
    folder = Path(name)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, file)
    except OSError:
        return None
    return None if found is None else Path(found)
