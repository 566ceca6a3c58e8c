"""Loading and scoring, against plain transformers as the judge."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, RobertaConfig

from feedback.records import Message
from reward.model import MAX_LENGTH_CAP, RewardModel, choose_max_length, choose_template, load_reward_model
from reward.rendering import Rendered
from tests.fakes.models import build_tiny_causal_lm
from tests.reward.conftest import FAMILIES, TinyReward

# peft asks transformers by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

AS_TRANSFORMERS = 1e-4
NEIGHBOUR_TOLERANCE = 1e-5


def conversation(number: int) -> tuple[list[Message], list[Message]]:
    words = [
        "the",
        "capital",
        "of",
        "France",
        "is",
        "not",
        "what",
        "you",
        "think",
        "it",
        "is,",
        "my",
        "friend",
        "of",
        "many",
        "words",
    ]
    asked = " ".join(words[: 1 + number % 7])
    answered = " ".join(words[number % 5 : 5 + 2 * number])
    return [{"role": "user", "content": asked}], [{"role": "assistant", "content": f"{number}: {answered}"}]


def rendered(model: RewardModel, count: int = 9) -> list[Rendered]:
    """Of very different lengths."""
    return [model.renderer.render(*conversation(number)) for number in range(count)]


def load(folder: Path) -> RewardModel:
    return load_reward_model(str(folder), device="cpu")


@torch.inference_mode()
def transformers_reward(classifier: Any, item: Rendered) -> float:
    """One unpadded sequence through the model's own class."""
    inputs: dict[str, Tensor] = {"input_ids": torch.tensor([item.ids])}
    if item.token_type_ids is not None:
        inputs["token_type_ids"] = torch.tensor([item.token_type_ids])
    return float(classifier(**inputs).logits.squeeze())


def changed_config(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_are_those_of_transformers_on_one_unpadded_input(family: str, tiny_reward: TinyReward) -> None:
    """R1: read at the last real token; end tokens within the conversation are none, nor is what stands in padding."""
    folder = tiny_reward(family)
    model = load(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    items = rendered(model)
    expected = [transformers_reward(classifier, item) for item in items]
    assert len({round(reward, 3) for reward in expected}) > 5  # the model tells them apart
    assert model.raw_rewards(items) == pytest.approx(expected, abs=AS_TRANSFORMERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reward_does_not_depend_on_its_neighbours(family: str, tiny_reward: TinyReward) -> None:
    model = load(tiny_reward(family))
    items = rendered(model)
    alone = [model.raw_rewards([item])[0] for item in items]
    assert model.raw_rewards(items) == pytest.approx(alone, abs=NEIGHBOUR_TOLERANCE)
    order = list(range(len(items)))
    random.Random(7).shuffle(order)
    shuffled = model.raw_rewards([items[i] for i in order])
    assert shuffled == pytest.approx([alone[i] for i in order], abs=NEIGHBOUR_TOLERANCE)
    assert model.score_all(items, max_batch_tokens=64) == pytest.approx(alone, abs=NEIGHBOUR_TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_padding_token_that_is_also_the_end_token_moves_no_score(
    family: str, tiny_reward: TinyReward, tmp_path: Path
) -> None:
    """R2: texts of the plain template end with EOS; transformers' own head then reads the token before it."""
    source = tiny_reward(family)
    tokenizer = AutoTokenizer.from_pretrained(source)
    folder = changed_config(source, tmp_path / "same", pad_token_id=tokenizer.eos_token_id)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    model = load(folder)
    items = rendered(model)
    assert model.manifest.template == "plain"
    assert all(item.ids[-1] == tokenizer.eos_token_id for item in items)
    # With another pad token, transformers reads the last one.
    classifier = AutoModelForSequenceClassification.from_pretrained(source).eval()
    expected = [transformers_reward(classifier, item) for item in items]
    assert model.raw_rewards(items) == pytest.approx(expected, abs=AS_TRANSFORMERS)
    trapped = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert abs(transformers_reward(trapped, items[0]) - expected[0]) > 0.01


def test_a_published_model_without_a_manifest_is_described_by_its_own_files(tiny_reward: TinyReward) -> None:
    decoder, encoder = load(tiny_reward("llama")), load(tiny_reward("bert"))
    assert (decoder.manifest.name, decoder.manifest.template, decoder.manifest.max_length) == ("llama", "chat", 512)
    assert encoder.manifest.template == "pair"
    for model in (decoder, encoder):
        assert model.manifest.normalisation.reward(1.5) == 1.5
        assert not model.manifest.probes
        assert not any(parameter.requires_grad for parameter in model.network.parameters())
        assert not model.network.training


def test_long_input_is_cut_to_what_the_model_can_take(tiny_reward: TinyReward) -> None:
    for family in FAMILIES:
        model = load(tiny_reward(family))
        long: list[Message] = [{"role": "user", "content": "word " * 3000}]
        item = model.renderer.render(long, conversation(1)[1])
        assert item.truncated
        assert len(item) == 512
        assert len(model.raw_rewards([item])) == 1


def test_a_reward_that_is_not_a_number_is_an_error(tiny_reward: TinyReward) -> None:
    model = load(tiny_reward("llama"))
    with torch.no_grad():
        next(model.network.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        model.raw_rewards(rendered(model, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_near(family: str, tiny_reward: TinyReward) -> None:
    exact, near = load(tiny_reward(family)), load_reward_model(str(tiny_reward(family)), device="cpu", dtype="bf16")
    assert near.dtype is torch.bfloat16
    items = rendered(exact)
    assert near.raw_rewards(items) == pytest.approx(exact.raw_rewards(items), abs=0.15)


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, Any]:
    """A LoRA adapter with its head over a language model, and the network that was saved."""
    base = build_tiny_causal_lm(tmp_path / "base")
    torch.manual_seed(1)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    trained = get_peft_model(classifier, lora).eval()
    folder = tmp_path / "adapter"
    trained.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder, trained


def test_an_adapter_with_its_head_reloads_exactly(adapter: tuple[Path, Any]) -> None:
    folder, trained = adapter
    model = load(folder)
    items = rendered(model)
    expected = [transformers_reward(trained, item) for item in items]
    assert model.raw_rewards(items) == pytest.approx(expected, abs=1e-5)
    assert load(folder).raw_rewards(items) == model.raw_rewards(items)


class _Limit:
    def __init__(self, model_max_length: int, chat_template: str | None = None) -> None:
        self.model_max_length = model_max_length
        self.chat_template = chat_template


@pytest.mark.parametrize(
    ("config", "tokenizer_limit", "expected"),
    [
        (BertConfig(max_position_embeddings=512), 10**30, 512),
        (BertConfig(max_position_embeddings=512), 256, 256),
        (BertConfig(max_position_embeddings=100_000), 10**30, MAX_LENGTH_CAP),
        # Positions are counted from pad_token_id + 1 = 2: of 514 there are 512 left.
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 10**30, 512),
    ],
)
def test_the_longest_input_is_what_model_and_tokenizer_allow(config: Any, tokenizer_limit: int, expected: int) -> None:
    assert choose_max_length(config, _Limit(tokenizer_limit)) == expected


@pytest.mark.parametrize(
    ("chat_template", "is_encoder", "expected"),
    [("x", True, "chat"), ("x", False, "chat"), (None, True, "pair"), (None, False, "plain")],
)
def test_the_template_follows_the_tokenizer(chat_template: str | None, is_encoder: bool, expected: str) -> None:
    assert choose_template(_Limit(1, chat_template), is_encoder=is_encoder) == expected
