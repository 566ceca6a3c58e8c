"""Policies as folders: loaded whole, with adapters, and saved to be loaded by others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from reward.errors import ModelLoadError
from tests.fakes.models import build_tiny_causal_lm
from training.options import LoraOptions, OptionsError, PolicyLoraOptions
from training.policies import Policy, load_policy, save_policy

IDS = torch.arange(10, 22)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_causal_lm(tmp_path_factory.mktemp("base"))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(IDS).logits
    return found


def trained(policy: Policy) -> Policy:
    """With other weights than it came with."""
    rng = torch.Generator().manual_seed(1)
    state = policy.trainable_state()
    policy.load_trainable_state(
        {name: value + 0.1 * torch.randn(value.shape, generator=rng) for name, value in state.items()}
    )
    return policy


def test_tuning_says_which_weights_get_gradients(base: Path) -> None:
    full, lora, frozen = (load_policy(str(base), tuning=tuning) for tuning in ("full", "lora", "frozen"))
    assert all(p.requires_grad for p in full.model.parameters()) and not full.has_adapter
    assert lora.has_adapter and all("lora_" in name for name in lora.trainable_state())
    assert not frozen.trainable_state() and not frozen.model.training


def test_a_new_adapter_changes_nothing_and_can_be_switched_off(base: Path) -> None:
    policy, plain = load_policy(str(base), tuning="lora"), load_policy(str(base), tuning="frozen")
    assert torch.equal(logits(policy.model), logits(plain.model))
    trained(policy)
    assert not torch.allclose(logits(policy.model), logits(plain.model))
    with policy.without_adapter():
        assert torch.equal(logits(policy.model), logits(plain.model))


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_s5_there_is_no_dropout_unless_asked_for(tuning: Any, tmp_path: Path) -> None:
    """GPT-2 comes with some of its own."""
    gpt2 = str(build_tiny_causal_lm(tmp_path / "gpt2", family="gpt2"))
    model = load_policy(gpt2, tuning=tuning, lora=PolicyLoraOptions()).model.train()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, model(IDS).logits)
    dropping = load_policy(gpt2, tuning="lora", lora=LoraOptions(dropout=0.5))
    with torch.no_grad():
        trained(dropping).model.train()
        assert not torch.equal(dropping.model(IDS).logits, dropping.model(IDS).logits)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_saved_policy_loads_as_what_it_is(tuning: Any, base: Path, tmp_path: Path) -> None:
    policy = trained(load_policy(str(base), tuning=tuning))
    expected = logits(policy.model)
    save_policy(policy, tmp_path / "policy")
    assert (tmp_path / "policy" / "adapter_config.json").is_file() == (tuning == "lora")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.allclose(logits(stock), expected, atol=1e-5)
    ours = load_policy(str(tmp_path / "policy"), tuning="frozen")
    assert torch.allclose(logits(ours.model), expected, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template == policy.tokenizer.chat_template
    settings = json.loads((tmp_path / "policy" / "generation_config.json").read_text(encoding="utf-8"))
    assert settings["eos_token_id"] == sorted(policy.stop_ids)


def test_an_adapter_can_be_saved_whole_and_goes_on_as_it_was(base: Path, tmp_path: Path) -> None:
    policy = trained(load_policy(str(base), tuning="lora"))
    expected = logits(policy.model)
    save_policy(policy, tmp_path / "policy", merge=True)
    assert (tmp_path / "policy" / "model.safetensors").is_file()
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "policy")), expected, atol=1e-5)
    assert torch.equal(logits(policy.model), expected), "saving leaves the policy as it was"
    assert policy.has_adapter


def test_training_goes_on_from_an_adapters_folder(base: Path, tmp_path: Path) -> None:
    first = trained(load_policy(str(base), tuning="lora"))
    save_policy(first, tmp_path / "first")
    second = load_policy(str(tmp_path / "first"), tuning="lora", lora=LoraOptions(rank=2))
    trained(second)
    with second.without_adapter():
        assert torch.allclose(logits(second.model), logits(first.model), atol=1e-5), "its reference is the first policy"
    save_policy(second, tmp_path / "second")
    assert not (tmp_path / "second" / "adapter_config.json").exists(), "its base lies nowhere on disk"
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "second")), logits(second.model), atol=1e-5
    )


def test_other_weights_can_be_saved_in_place_of_those_in_the_model(base: Path, tmp_path: Path) -> None:
    policy = trained(load_policy(str(base), tuning="lora"))
    kept = {name: value.clone() for name, value in policy.trainable_state().items()}
    expected = logits(policy.model)
    trained(policy)
    after = logits(policy.model)
    save_policy(policy, tmp_path / "policy", trainable=kept)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.allclose(logits(stock), expected, atol=1e-5)
    assert torch.equal(logits(policy.model), after)


def test_a_policy_is_there_whole_or_not_at_all(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(str(base), tuning="full")

    def fails(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(type(policy.tokenizer), "save_pretrained", fails)
    with pytest.raises(OSError, match="disk full"):
        save_policy(policy, tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_a_chat_template_gets_one_that_is_saved(tmp_path: Path) -> None:
    policy = load_policy(str(build_tiny_causal_lm(tmp_path / "base", chat_template=False)), tuning="full")
    save_policy(policy, tmp_path / "policy")
    text = AutoTokenizer.from_pretrained(tmp_path / "policy").apply_chat_template(
        [{"role": "user", "content": "one"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("User:\none\n\nAssistant:\n")


def test_what_is_no_language_model_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="cannot load a language model"):
        load_policy(str(tmp_path), tuning="full")
    with pytest.raises(ModelLoadError, match="no-such-package"):
        load_policy("package:no-such-package", tuning="full")
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelLoadError, match="does not say what it adapts"):
        load_policy(str(tmp_path), tuning="full")
