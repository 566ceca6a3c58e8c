"""A base with a head of ours on pooled hidden states, against the same sums written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from feedback.records import Message
from reward.errors import ModelLoadError
from reward.loading import HEAD_FILE
from reward.manifest import Head, Manifest
from reward.model import RewardModel, load_reward_model
from reward.network import batches_by_length, build_head, collate, pool
from reward.rendering import Rendered
from tests.fakes.models import build_tiny_causal_lm, build_tiny_encoder_reward_model

# peft asks transformers by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

HEADS = [
    Head("pooled", ("last",)),
    Head("pooled", ("mean",)),
    Head("pooled", ("last", "mean"), num_layers=1),
    Head("pooled", ("last", "mean"), domains=("help", "harm")),
    Head("pooled", ("last", "mean"), num_layers=2, domains=("help", "harm"), layers=(1, 2)),
]
HEAD_NAMES = ["last", "mean", "cut", "gated", "two layers"]
WIDTH = 32


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_causal_lm(tmp_path_factory.mktemp("pooled") / "base")


def save_pooled(folder: Path, base: Path, head: Head) -> Any:
    """Writes a reward model and returns the head it has."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(2)
    built = build_head(WIDTH, head)
    save_file(built.state_dict(), folder / HEAD_FILE)
    Manifest("pooled", str(base), head, "chat", 256).save(folder)
    return built


def load(folder: Path) -> RewardModel:
    return load_reward_model(str(folder), device="cpu")


def items_of(model: RewardModel) -> list[Rendered]:
    items = []
    for number in range(7):
        prompt: list[Message] = [{"role": "user", "content": "Why is it so? " * (number % 3 + 1)}]
        items.append(model.renderer.render(prompt, [{"role": "assistant", "content": "Because. " * (5 * number + 1)}]))
    return items


@torch.inference_mode()
def by_hand(backbone: Any, built: Any, head: Head, item: Rendered) -> float:
    states = backbone(input_ids=torch.tensor([item.ids]), output_hidden_states=True).hidden_states
    depth = len(backbone.layers)
    # Of the last layer transformers gives what comes after the final norm, of the others what comes before.
    normed = {layer: states[layer][0] if layer == depth else backbone.norm(states[layer])[0] for layer in (1, depth)}
    pooled = torch.cat(
        [
            normed[layer][-1] if kind == "last" else normed[layer][item.completion_start :].mean(dim=0)
            for layer in head.layers or (head.num_layers or depth,)
            for kind in head.pooling
        ]
    )
    asked = normed[head.num_layers or depth][: item.completion_start]
    if not head.domains:
        return float(built.weight[0] @ pooled + built.bias[0])
    shares = torch.softmax(built.gate.weight @ torch.cat([asked[-1], asked.mean(dim=0)]) + built.gate.bias, dim=0)
    return float(shares @ (built.experts.weight @ pooled + built.experts.bias))


@pytest.mark.parametrize("head", HEADS, ids=HEAD_NAMES)
def test_rewards_are_the_sums_written_out_alone_padded_or_shuffled(head: Head, base: Path, tmp_path: Path) -> None:
    built = save_pooled(tmp_path, base, head)
    model = load(tmp_path)
    items = items_of(model)
    backbone = AutoModel.from_pretrained(base).eval()
    expected = [by_hand(backbone, built, head, item) for item in items]
    assert len({round(reward, 3) for reward in expected}) == len(items)
    alone = [model.raw_rewards([item])[0] for item in items]
    assert alone == pytest.approx(expected, abs=1e-4)
    assert model.raw_rewards(items) == pytest.approx(alone, abs=1e-5)
    assert model.raw_rewards(items[::-1])[::-1] == pytest.approx(alone, abs=1e-5)


def test_only_the_layers_that_are_read_are_kept(base: Path, tmp_path: Path) -> None:
    save_pooled(tmp_path, base, HEADS[-1])
    model = load(tmp_path)
    asked: list[object] = []
    model.network.backbone.register_forward_pre_hook(  # type: ignore[operator]
        lambda module, args, kwargs: asked.append(kwargs["output_hidden_states"]), with_kwargs=True
    )
    model.raw_rewards(items_of(model))
    assert asked == [[1]]


@pytest.mark.parametrize("head", [HEADS[-2], HEADS[-1]], ids=HEAD_NAMES[-2:])
def test_it_compiles_in_one_piece(head: Head, base: Path, tmp_path: Path) -> None:
    save_pooled(tmp_path, base, head)
    model = load(tmp_path)
    batch = collate(items_of(model), torch.device("cpu"))
    with torch.inference_mode():
        expected = model.network(batch)
        compiled = torch.compile(model.network, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(batch), expected, atol=1e-6)


def test_several_layers_of_a_base_without_a_final_norm_are_refused(base: Path, tmp_path: Path) -> None:
    head = Head("pooled", ("mean",), num_layers=2, layers=(1, 2))
    encoder = build_tiny_encoder_reward_model(tmp_path / "encoder")
    save_pooled(tmp_path / "model", encoder, head)
    with pytest.raises(ModelLoadError, match="several layers cannot be read from BertModel"):
        load(tmp_path / "model")


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_other_decoders_name_their_final_norm_too(family: Literal["qwen2", "gpt2"], tmp_path: Path) -> None:
    base = build_tiny_causal_lm(tmp_path / "base", family=family)
    save_pooled(tmp_path / "model", base, Head("pooled", ("mean",), num_layers=2, layers=(1, 2)))
    model = load(tmp_path / "model")
    assert len(set(model.raw_rewards(items_of(model)))) == 7


def test_a_lora_adapter_beside_the_head_counts(base: Path, tmp_path: Path) -> None:
    head = HEADS[0]
    built = save_pooled(tmp_path, base, head)
    bare = load(tmp_path)
    torch.manual_seed(3)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    adapted = get_peft_model(AutoModel.from_pretrained(base), lora).eval()
    adapted.save_pretrained(tmp_path)
    model = load(tmp_path)
    items = items_of(model)
    expected = [by_hand(adapted, built, head, item) for item in items]
    assert model.raw_rewards(items) == pytest.approx(expected, abs=1e-5)
    assert model.raw_rewards(items) != pytest.approx(bare.raw_rewards(items), abs=1e-2)


def test_a_tokenizer_of_its_own_goes_before_the_bases(base: Path, tmp_path: Path) -> None:
    save_pooled(tmp_path, base, HEADS[0])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "[{{ messages[0]['content'] }}]{{ messages[-1]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    item = load(tmp_path).renderer.render([{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}])
    assert tokenizer.decode(item.ids) == "[a]b"


@pytest.mark.parametrize("head", HEADS, ids=HEAD_NAMES)
def test_a_missing_head_is_refused(head: Head, base: Path, tmp_path: Path) -> None:
    save_pooled(tmp_path, base, head)
    (tmp_path / HEAD_FILE).unlink()
    with pytest.raises(ModelLoadError, match=r"head\.safetensors is missing: the reward head was not saved"):
        load(tmp_path)


@pytest.mark.parametrize("tensors", [{}, {"weight": torch.zeros(1, 5)}, {"other": torch.zeros(1)}])
def test_a_head_that_does_not_fit_is_refused(base: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_pooled(tmp_path, base, HEADS[0])
    save_file(tensors, tmp_path / HEAD_FILE)
    with pytest.raises(ModelLoadError, match=r"head\.safetensors does not hold this head"):
        load(tmp_path)


def test_a_base_that_is_gone_is_refused(base: Path, tmp_path: Path) -> None:
    save_pooled(tmp_path, base / "gone", HEADS[0])
    with pytest.raises(ModelLoadError, match="cannot load the reward model"):
        load(tmp_path)


def test_a_fresh_linear_head_has_the_published_spread_and_no_offset() -> None:
    torch.manual_seed(0)
    head: Any = build_head(4000, Head("pooled", ("last", "mean")))
    assert head.weight.detach().std().item() == pytest.approx(8001**-0.5, rel=0.05)
    assert head.bias.tolist() == [0.0]


def test_poolings_by_hand() -> None:
    hidden = torch.tensor([[[1.0], [2.0], [4.0], [torch.nan]], [[8.0], [torch.nan], [torch.nan], [torch.nan]]])
    attention = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    completion = torch.tensor([[False, True, True, False], [True, False, False, False]])
    assert pool(hidden, attention, completion, ("last", "mean")).tolist() == [[4.0, 3.0], [8.0, 8.0]]


def test_a_batch_is_padded_on_the_right_and_knows_its_completions() -> None:
    def item(ids: list[int], start: int, types: list[int] | None) -> Rendered:
        return Rendered(ids, start, types, truncated=False, prompt_tokens=start, completion_tokens=len(ids) - start)

    batch = collate([item([5, 6, 7], 1, [0, 1, 1]), item([8, 9], 1, [0, 1])], torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.completion_mask.tolist() == [[False, True, True], [False, True, False]]
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist() == [[0, 1, 1], [0, 1, 0]]
    assert collate([item([5], 0, None)], torch.device("cpu")).token_type_ids is None


def test_offline_batches_take_everyone_once_within_the_limit() -> None:
    lengths = [3, 50, 7, 7, 1, 200, 30]
    batches = batches_by_length(lengths, 60)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 60 for batch in batches)
    assert batches[0] == [5]
