"""Published reward models that are no stock classifiers, told apart by the names of their tensors.

A value head is read as GRM (arXiv 2406.10216) stores it: `v_head.summary`, a linear layer or several with ReLU between,
on the last token's hidden state after the final norm. ArmoRM's head with its gate is `armorm.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from safetensors import safe_open
from torch import Tensor, nn

from reward import armorm
from reward.errors import ModelLoadError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
VALUE_HEAD = "v_head.summary."

Layout = Literal["classifier", "value_head", "armorm"]

_FOREIGN: Mapping[str, str] = {
    "regression_layer.": "a regression head for several objectives, as QRM and URM have it",
    "v_head.": "a value head of another make, as InternLM2's and Athene's are",
    "value_head.": "a value head of another make",
    "out_proj.": "an output projection, as OpenAssistant's Pythia models have it",
    "score.0.": "a head of several layers, as INF-ORM has it",
    "rm_head.": "a head of its own make",
    "reward_head.": "a head of its own make",
}
"""What heads that are not read here begin with, the longer of two first."""


def find_layout(name: str) -> Layout:
    """What kind of head the folder or hub id holds.

    Raises `ModelLoadError` for one that holds a head of another make, or pickled weights only.
    """
    tensors = _stored(name)
    if any(tensor.startswith(VALUE_HEAD) for tensor in tensors):
        return "value_head"
    if armorm.REGRESSION in tensors and armorm.is_armo(_shapes(name, armorm_names(tensors))):
        return "armorm"
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
    return "classifier"


def read_value_head(name: str) -> nn.Sequential:
    """The value head of a model of that layout. Raises `ModelLoadError` for one of an odd shape."""
    found = _tensors(name, [tensor for tensor in _stored(name) if tensor.startswith(VALUE_HEAD)])
    tensors = {tensor.removeprefix(VALUE_HEAD): value for tensor, value in found.items()}
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


def read_armo_head(name: str, temperature: float, heading: int) -> armorm.ArmoHead:
    """ArmoRM's head. Raises `ModelLoadError` for tensors that do not go together."""
    try:
        return armorm.ArmoHead(_tensors(name, armorm_names(_stored(name))), temperature, heading)
    except (KeyError, RuntimeError) as error:
        raise ModelLoadError(f"{name}: its gate cannot be read: {error}") from error


def armorm_names(tensors: Iterable[str]) -> list[str]:
    """Those of the head."""
    return [name for name in tensors if name in (armorm.REGRESSION, armorm.TRANSFORM) or name.startswith(armorm.SCALE)]


def _linear(tensors: Mapping[str, Tensor], beginning: str) -> nn.Linear:
    weight, bias = tensors[f"{beginning}weight"], tensors.get(f"{beginning}bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer


def _tensors(name: str, wanted: Sequence[str]) -> dict[str, Tensor]:
    return {tensor: opened.get_tensor(tensor) for tensor, opened in _opened(name, wanted)}


def _shapes(name: str, wanted: Sequence[str]) -> dict[str, tuple[int, ...]]:
    return {tensor: tuple(opened.get_slice(tensor).get_shape()) for tensor, opened in _opened(name, wanted)}


def _opened(name: str, wanted: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Each tensor with the open file that holds it. Raises `ModelLoadError` for a file that is missing."""
    stored = _stored(name)
    for tensor in wanted:
        file = _file(name, stored[tensor])
        if file is None:
            raise ModelLoadError(f"{name}: {stored[tensor]} is missing, which holds {tensor}")
        with safe_open(file, framework="pt") as opened:
            yield tensor, opened


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
