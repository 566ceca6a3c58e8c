"""A reward model that cannot be trusted as loaded is refused, with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from feedback.records import Message
from reward.devices import DeviceError
from reward.errors import ModelLoadError
from reward.manifest import FILE_NAME, Head, Manifest, Probe, load_manifest
from reward.model import load_reward_model
from reward.normalisation import Normalisation
from tests.fakes.models import build_tiny_causal_lm
from tests.reward.conftest import TinyReward

# peft asks transformers by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PROMPT: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]
COMPLETION: list[Message] = [{"role": "assistant", "content": "Paris."}]
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = {"kind": "pooled", "pooling": ["last"], "num_layers": 3, "domains": []}


def load(folder: Path) -> object:
    return load_reward_model(str(folder), device="cpu")


def rewrite_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture
def copied(tiny_reward: TinyReward, tmp_path: Path) -> Any:
    """A model of a family to spoil."""

    def copy(family: str) -> Path:
        return Path(shutil.copytree(tiny_reward(family), tmp_path / f"my-{family}"))

    return copy


@pytest.mark.parametrize(
    ("family", "tensors"),
    [("llama", ["score.weight"]), ("gpt2", ["score.weight"]), ("bert", ["classifier.bias", "classifier.weight"])],
)
def test_a_missing_head_is_named(copied: Any, family: str, tensors: list[str]) -> None:
    folder = copied(family)

    def behead(weights: dict[str, Any]) -> None:
        for name in tensors:
            del weights[name]

    rewrite_weights(folder, behead)
    with pytest.raises(ModelLoadError, match=f"does not hold {', '.join(tensors)}: the head would be random"):
        load(folder)


def test_a_missing_part_of_the_backbone_is_named(copied: Any) -> None:
    folder = copied("llama")
    rewrite_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight"):
        load(folder)


def test_a_head_of_another_shape_is_refused(copied: Any) -> None:
    folder = copied("llama")
    rewrite_weights(folder, lambda weights: weights.update({"score.weight": torch.zeros(2, 32)}))
    with pytest.raises(ModelLoadError, match="cannot load the reward model"):
        load(folder)


def test_a_tokenizer_with_more_tokens_than_the_base_is_refused(copied: Any) -> None:
    folder = copied("llama")
    rewrite_weights(folder, lambda weights: weights.update({_EMBEDDING: weights[_EMBEDDING][:8].clone()}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 8}))
    with pytest.raises(ModelLoadError, match="scoring a probe text failed"):
        load(folder)


def test_two_labels_are_no_reward(copied: Any) -> None:
    """R9"""
    folder = copied("llama")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "bad", "1": "good"}}))
    with pytest.raises(ModelLoadError, match=r"has 2 labels; a reward model has one \(config\.json: id2label\)"):
        load(folder)


def test_pickled_weights_are_refused(copied: Any) -> None:
    folder = copied("llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="safetensors"):
        load(folder)


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="cannot load the reward model"):
        load(tmp_path)


def test_an_unknown_device_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="'gpu' is not a device"):
        load_reward_model(str(tmp_path / "none"), device="gpu")


class TestAdapter:
    def save(self, folder: Path, **config: Any) -> Path:
        base = build_tiny_causal_lm(folder / "base")
        classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        trained = get_peft_model(classifier, LoraConfig(target_modules=["q_proj"], r=2, **config))
        trained.save_pretrained(folder / "adapter")
        AutoTokenizer.from_pretrained(base).save_pretrained(folder / "adapter")
        return folder / "adapter"

    def test_without_its_head_it_is_refused(self, tmp_path: Path) -> None:
        folder = self.save(tmp_path)
        with pytest.raises(ModelLoadError, match="holds no classification head: it would be random"):
            load(folder)

    def test_without_a_base_it_is_refused(self, tmp_path: Path) -> None:
        folder = self.save(tmp_path, task_type="SEQ_CLS")
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
        with pytest.raises(ModelLoadError, match="base_model_name_or_path is missing"):
            load(folder)

    def test_pickled_it_is_refused(self, tmp_path: Path) -> None:
        folder = self.save(tmp_path, task_type="SEQ_CLS")
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        with pytest.raises(ModelLoadError, match=r"adapter_model\.safetensors is missing"):
            load(folder)


class TestProbes:
    """Texts stored with their raw rewards when the model was saved."""

    def save(self, folder: Path, difference: float = 0.0, std: float = 1.0) -> None:
        (folder / FILE_NAME).unlink(missing_ok=True)
        model = load_reward_model(str(folder), device="cpu")
        (raw_reward,) = model.raw_rewards([model.renderer.render(PROMPT, COMPLETION)])
        probe = Probe(PROMPT, COMPLETION, raw_reward + difference)
        scale = Normalisation(0.0, std)
        Manifest("mine", "none", Head(), "chat", 128, normalisation=scale, probes=(probe,)).save(folder)

    def test_a_probe_that_scores_as_stored_lets_the_model_in(self, copied: Any) -> None:
        folder = copied("llama")
        self.save(folder)
        model = load_reward_model(str(folder), device="cpu")
        assert (model.manifest.name, model.renderer.max_length) == ("mine", 128)

    def test_the_tolerance_is_in_deviations(self, copied: Any) -> None:
        folder = copied("llama")
        self.save(folder, difference=0.01, std=100.0)
        load(folder)
        self.save(folder, difference=0.01)
        with pytest.raises(ModelLoadError, match=r"probe 0 scores .*, but .* is stored in reward\.json"):
            load(folder)

    @pytest.mark.parametrize("tensor", ["score.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
    def test_other_weights_are_noticed(self, copied: Any, tensor: str) -> None:
        folder = copied("llama")
        self.save(folder)
        rewrite_weights(folder, lambda weights: weights.update({tensor: weights[tensor] * 1.1 + 0.01}))
        with pytest.raises(ModelLoadError, match="is not the one this model was saved with"):
            load(folder)

    def test_another_chat_template_is_noticed(self, copied: Any) -> None:
        folder = copied("llama")
        self.save(folder)
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|im_start|>", "<|begin|>"))
        with pytest.raises(ModelLoadError, match="probe 0"):
            load(folder)

    def test_a_reward_that_is_no_number_is_noticed(self, copied: Any) -> None:
        folder = copied("llama")
        self.save(folder)
        rewrite_weights(folder, lambda weights: weights["score.weight"].fill_(torch.nan))
        with pytest.raises(ModelLoadError, match=r"probe text failed: .* not finite"):
            load(folder)


class TestManifest:
    def save(self, folder: Path, **changes: Any) -> None:
        scale = Normalisation.fit([0.0, 1.0, 5.0])
        probe = Probe(PROMPT, COMPLETION, 0.25)
        manifest = Manifest("m", "b", Head("pooled", ("last", "mean"), 3), "plain", 64, scale, 3, {}, {}, (probe,))
        manifest.save(folder)
        path = folder / FILE_NAME
        record = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))

    def test_it_survives_the_disk(self, tmp_path: Path) -> None:
        self.save(tmp_path)
        first = load_manifest(tmp_path)
        assert first is not None
        first.save(tmp_path)
        assert load_manifest(tmp_path) == first
        assert first.head == Head("pooled", ("last", "mean"), 3)
        assert first.normalisation == Normalisation.fit([0.0, 1.0, 5.0])
        assert first.probes == (Probe(PROMPT, COMPLETION, 0.25),)

    def test_one_written_before_heads_had_layers_is_read(self, tmp_path: Path) -> None:
        self.save(tmp_path, head=_HEAD)
        loaded = load_manifest(tmp_path)
        assert loaded is not None
        assert loaded.head == Head("pooled", ("last",), 3)
        self.save(tmp_path, head={**_HEAD, "layers": [1, 3]})
        loaded = load_manifest(tmp_path)
        assert loaded is not None
        assert loaded.head.layers == (1, 3)

    def test_a_folder_without_one_has_none(self, tmp_path: Path) -> None:
        assert load_manifest(tmp_path) is None

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"format": 2}, "format 2 is not 1"),
            ({"template": "odd"}, "template 'odd'"),
            ({"head": {"kind": "odd", "pooling": ["last"], "num_layers": None, "domains": []}}, "kind 'odd'"),
            ({"head": {"kind": "pooled", "pooling": ["max"], "num_layers": None, "domains": []}}, "pooling"),
            ({"head": {"kind": "pooled", "pooling": [], "num_layers": None, "domains": []}}, "pooling"),
            ({"head": {**_HEAD, "layers": [2, 1]}}, "layers [2, 1] must rise from 1 or more to num_layers, 3"),
            ({"head": {**_HEAD, "layers": [1, 2]}}, "layers [1, 2]"),
            ({"head": {**_HEAD, "layers": [0, 3]}}, "layers [0, 3]"),
            ({"head": {**_HEAD, "layers": [1, 1, 3]}}, "layers [1, 1, 3]"),
            ({"head": {**_HEAD, "layers": ["1", 3]}}, FILE_NAME),
            ({"max_length": 2}, "max_length 2"),
            ({"max_length": "64"}, "max_length '64'"),
            ({"normalisation": {"mean": 0.0, "std": 0.0, "quantiles": []}}, "std above 0"),
            ({"normalisation": {"mean": 0.0}}, "'std' is missing"),
            ({"probes": [{"prompt": []}]}, "raw_reward"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
        self.save(tmp_path, **changes)
        with pytest.raises(ModelLoadError) as caught:
            load_manifest(tmp_path)
        assert str(caught.value).startswith(str(tmp_path / FILE_NAME))
        assert problem in str(caught.value)

    def test_a_file_that_is_no_json_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / FILE_NAME).write_text("{")
        with pytest.raises(ModelLoadError, match=FILE_NAME):
            load_manifest(tmp_path)
