"""Published reward models: which load as they are, with the rewards of their own model cards, and which are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from feedback.records import Message
from reward.errors import ModelLoadError
from reward.model import RewardModel, load_reward_model
from tests.fakes import published

QUESTION = "What is the capital of France?"
ANSWERS = ("Paris.", "The capital of France is Paris, a city that everybody likes.", "I do not know: is it Rome?")
TOLERANCE = 1e-4

Build = Callable[[Path], Path]


def rewards(model: RewardModel) -> list[float]:
    """Of all answers in one batch."""
    prompt: list[Message] = [{"role": "user", "content": QUESTION}]
    items = [model.renderer.render(prompt, [{"role": "assistant", "content": answer}]) for answer in ANSWERS]
    assert not any(item.truncated for item in items)
    shared = model.raw_rewards(model.shared(items))
    assert shared == pytest.approx(model.raw_rewards(items), abs=TOLERANCE)
    return shared


def conversation_ids(tokenizer: Any, answer: str) -> Tensor:
    """As model cards of decoders have it: the whole conversation by the tokenizer's own template, one BOS."""
    talk = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
    encoded = tokenizer.apply_chat_template(talk, tokenize=True, return_tensors="pt", return_dict=True)
    ids: Tensor = encoded["input_ids"]
    return ids


@torch.inference_mode()
def by_classifier(folder: Path) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return [model(conversation_ids(tokenizer, answer)).logits[0][0].item() for answer in ANSWERS]


@torch.inference_mode()
def by_pairs(folder: Path) -> list[float]:
    """The model card of OpenAssistant's: `tokenizer(question, answer)`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    encoded = [tokenizer(QUESTION, answer, return_tensors="pt") for answer in ANSWERS]
    return [model(**one).logits[0].item() for one in encoded]


@torch.inference_mode()
def by_value_head(folder: Path) -> list[float]:
    """The last token's state after the final norm through `v_head.summary`, as GRM's own class does it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tensors = load_file(folder / "model-00002-of-00002.safetensors")
    names = sorted({name.rpartition(".")[0] for name in tensors})
    found = []
    for answer in ANSWERS:
        state = base(conversation_ids(tokenizer, answer)).last_hidden_state[0, -1]
        for number, name in enumerate(names):
            state = state.relu() if number else state
            state = nn.functional.linear(state, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
        found.append(state.item())
    return found


@torch.inference_mode()
def by_gate(folder: Path) -> list[float]:
    """ArmoRM's own steps: the gate reads the token before the last heading of an assistant's turn."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tensors = load_file(folder / "model-00002-of-00002.safetensors")
    heading = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    found = []
    for answer in ANSWERS:
        ids = conversation_ids(tokenizer, answer)
        listed = ids[0].tolist()
        begins = [place for place in range(len(listed)) if listed[place : place + len(heading)] == heading]
        states = base(ids).last_hidden_state[0]
        rewards = tensors["regression_layer.weight"] @ states[-1] @ tensors["reward_transform_matrix"]
        gate = states[begins[-1] - 1]
        for number in range(2):
            gate = gate.relu() if number else gate
            weight, bias = tensors[f"gating.layers.{number}.weight"], tensors[f"gating.layers.{number}.bias"]
            gate = nn.functional.linear(gate, weight, bias)
        shares = (gate / 10).softmax(dim=0) * tensors["gating.logit_scale"]
        found.append((shares * rewards).sum().item())
    return found


def build_grm_linear(path: Path) -> Path:
    return published.build_grm(path, layers=0)


@pytest.mark.parametrize(
    ("build", "direct", "template"),
    [
        (published.build_openassistant_deberta, by_pairs, "pair"),
        (published.build_skywork_qwen3, by_classifier, "chat"),
        (published.build_skywork_llama, by_classifier, "chat"),
        (published.build_grm, by_value_head, "chat"),
        (build_grm_linear, by_value_head, "chat"),
        (published.build_armorm, by_gate, "chat"),
    ],
)
def test_it_loads_as_it_is_and_scores_as_its_card_says(
    build: Build, direct: Callable[[Path], list[float]], template: str, tmp_path: Path
) -> None:
    folder = build(tmp_path / "published")
    model = load_reward_model(str(folder), device="cpu")
    assert model.manifest.template == template
    found = rewards(model)
    assert len({round(reward, 3) for reward in found}) == len(ANSWERS)
    assert found == pytest.approx(direct(folder), abs=TOLERANCE)
    # Without references there is nothing to be normalised by.
    assert model.manifest.normalisation.reward(1.25) == 1.25
    assert model.manifest.normalisation.at_percentile(20) is None


@pytest.mark.parametrize("trust", [False, True])
def test_another_gate_is_refused_and_no_code_of_others_runs(trust: bool, tmp_path: Path) -> None:
    """QRM's has several quantiles an objective."""
    folder = published.build_armorm(tmp_path / "qrm")
    load_reward_model(str(folder), device="cpu", trust_remote_code=trust)
    file = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    tensors["regression_layer.weight"] = torch.zeros(5 * 19, 32)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"regression_layer\.weight: .*QRM.* name the address by reward\.url"):
        load_reward_model(str(folder), device="cpu", trust_remote_code=trust)


@pytest.mark.parametrize("tensor", ["v_head.weight", "out_proj.weight", "score.0.weight"])
def test_other_heads_are_named(tensor: str, tmp_path: Path) -> None:
    folder = published.build_skywork_llama(tmp_path / "other")
    weights = load_file(folder / "model.safetensors")
    weights[tensor] = weights.pop("score.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=f"keeps its reward head in {tensor}"):
        load_reward_model(str(folder), device="cpu")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"pickled weights only .* save_pretrained, which writes safetensors"):
        load_reward_model(str(published.build_pickled(tmp_path / "old")), device="cpu")


def test_a_value_head_of_an_odd_shape_is_refused(tmp_path: Path) -> None:
    folder = published.build_grm(tmp_path / "grm")
    file = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    tensors["v_head.summary.2.weight"] = torch.zeros(3, 24)
    tensors["v_head.summary.2.bias"] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="gives no single number"):
        load_reward_model(str(folder), device="cpu")
    file.unlink()
    with pytest.raises(ModelLoadError, match="00002-of-00002"):
        load_reward_model(str(folder), device="cpu")


@pytest.mark.parametrize("shape", [(24,), (24, 15)])
def test_a_value_head_that_does_not_go_with_its_base_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    folder = published.build_grm(tmp_path / "grm")
    file = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(file) | {"v_head.summary.0.weight": torch.zeros(shape)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="grm"):
        load_reward_model(str(folder), device="cpu")


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "adapter_config.json"])
def test_a_file_that_holds_no_object_is_refused(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("[]")
    with pytest.raises(ModelLoadError, match="cannot load the reward model"):
        load_reward_model(str(tmp_path), device="cpu")
