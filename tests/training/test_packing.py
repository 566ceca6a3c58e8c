"""A packed row is its completions, each with the prompt: rewards, loss, gradients; where it is not, it is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModel, BloomConfig, BloomModel, MistralConfig, MistralModel, Qwen2Config, Qwen2Model

from feedback.jsonl import Skipped
from feedback.rankings import Pair, ranking_pairs
from reward.manifest import Head
from reward.network import GatedHead, PooledRewardModel, build_head, collate
from reward.rendering import Rendered
from tests.fakes.models import Family, build_tiny_causal_lm, build_tiny_encoder_reward_model
from tests.training import tasks
from tests.training.conftest import Task
from training.batches import EncodedGroup, encode_groups, flatten
from training.comparisons import read_comparisons
from training.losses import pairwise_ranking_loss
from training.models import load_trainable
from training.packing import Packing, choose_packing, pack, shared_length, split
from training.reward_model import train_reward_model

CPU = torch.device("cpu")
FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "gpt2")
TINY: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
}


def item(prompt: list[int], own: list[int]) -> Rendered:
    return Rendered([*prompt, *own], len(prompt), None, False, len(prompt), len(own))


def group(prompt: list[int], *completions: list[int], ranks: list[int] | None = None) -> EncodedGroup:
    pairs = [Pair(*pair) for pair in ranking_pairs(ranks or list(range(len(completions))))]
    return EncodedGroup([item(prompt, own) for own in completions], pairs, "data")


IDS = st.lists(st.integers(0, 80), min_size=1, max_size=12)
GROUPS = st.lists(
    st.builds(lambda prompt, completions: group(prompt, *completions), IDS, st.lists(IDS, min_size=2, max_size=4)),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_causal_lm(tmp_path_factory.mktemp("base") / request.param, family=request.param)


def network_of(base: Path, head: Head, **arguments: Any) -> PooledRewardModel:
    backbone = AutoModel.from_pretrained(base, **arguments)
    torch.manual_seed(1)
    return PooledRewardModel(backbone, build_head(backbone.config.hidden_size, head), head.pooling, head.layers).eval()


def loss_and_gradients(network: PooledRewardModel, groups: list[EncodedGroup], *, packed: bool) -> dict[str, Tensor]:
    network.zero_grad()
    batch = flatten(groups)
    additive = network.backbone.config._attn_implementation == "eager"  # type: ignore[union-attr]
    tensors = pack([g.items for g in groups], CPU, additive_mask=additive) if packed else collate(batch.items, CPU)
    rewards = network(tensors)
    loss = pairwise_ranking_loss(rewards, batch.better, batch.worse, batch.weights, batch.margins)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    return {"rewards": rewards.detach(), "loss": loss.detach(), **gradients}


HEADS = {
    "last": Head(),
    "pooled": Head("pooled", ("last", "mean"), 2, (), (1, 2)),
    "gated": Head("pooled", ("last", "mean"), None, ("a", "b")),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_are_those_of_each_completion_alone(base: Path, head: str, attention: str) -> None:
    network = network_of(base, HEADS[head], attn_implementation=attention)
    groups = [
        group([5, 6, 7, 8, 9], [1, 2, 3], [4], [1, 2, 9, 9, 9, 9], [1], ranks=[1, 2, 2, 3]),
        group([5, 6], [7, 8, 9], [30, 31]),
        group([], [7, 8], [9, 10, 11]),  # nothing in common
        group([3] * 20, [4], [4, 4]),  # one is the other's beginning
    ]
    apart, packed = (loss_and_gradients(network, groups, packed=packed) for packed in (False, True))
    assert apart.keys() == packed.keys()
    assert len(apart) > 10
    for name, expected in apart.items():
        assert torch.allclose(packed[name], expected, rtol=1e-5, atol=1e-5), name


@given(GROUPS)
@settings(max_examples=40, deadline=None)
def test_rewards_of_random_groups_are_equal(base: Path, groups: list[EncodedGroup]) -> None:
    network = network_of(base, HEADS["pooled"])
    with torch.no_grad():
        packed = network(pack([g.items for g in groups], CPU))
        apart = torch.cat([network(collate([one], CPU)) for g in groups for one in g.items])
    assert torch.allclose(packed, apart, atol=2e-5)


def test_only_the_prompt_stands_once() -> None:
    groups = [group([1, 2, 3], [4, 5], [6]), group([1], [2, 3], [2, 4])]
    batch = pack([g.items for g in groups], CPU)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 0, 0]]  # the second share 1, 2
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 2, 0, 0]]
    assert batch.visible[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]
    assert batch.attention_mask.sum(dim=1).tolist() == [5, 4, 3, 3]
    assert batch.completion_mask.sum(dim=1).tolist() == [2, 1, 2, 2]


@given(GROUPS, st.integers(1, 400), st.booleans())
def test_every_group_is_in_one_part_within_its_tokens(groups: list[EncodedGroup], tokens: int, on: bool) -> None:
    parts = split(groups, tokens, Packing(32, additive_mask=False) if on else None)
    assert sorted(id(g) for part in parts for g in part.groups) == sorted(map(id, groups))
    assert on or not any(part.packed for part in parts)
    for part in parts:
        if part.packed:
            assert len(part.groups) == 1 or pack([g.items for g in part.groups], CPU).input_ids.numel() <= tokens


def test_packing_is_for_prompts_that_are_shared() -> None:
    packing = Packing(32, additive_mask=False)
    assert packing.pays(group([1] * 50, [2] * 10, [3] * 10))
    assert not packing.pays(group([], [2] * 10, [3] * 10))
    # A row of 4096 tokens attends to so many that one token saved is none.
    assert not packing.pays(group([1], [2] * 2048, [3] * 2048))


def test_decoders_of_the_usual_kinds_are_packed_for(base: Path) -> None:
    assert choose_packing(network_of(base, Head()), "auto", 512) == Packing(32, additive_mask=False)
    assert choose_packing(network_of(base, Head()), "off", 512) is None
    eager = network_of(base, Head(), attn_implementation="eager")
    assert choose_packing(eager, "auto", 512) == Packing(32, additive_mask=True)


def test_the_trial_changes_neither_mode_nor_chance(base: Path) -> None:
    network = network_of(base, Head()).train()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    choose_packing(network, "auto", 512)
    assert network.training
    assert torch.equal(torch.rand(1), expected)


def test_where_a_mask_would_undo_a_window_nothing_is_packed() -> None:
    mistral = MistralModel(MistralConfig(**TINY, sliding_window=64))
    qwen = Qwen2Model(Qwen2Config(**TINY, use_sliding_window=True, sliding_window=64, max_window_layers=1))
    for backbone in (mistral, qwen):
        network = PooledRewardModel(backbone, build_head(32, Head()), ("last",))
        assert choose_packing(network, "auto", 65) is None
        assert choose_packing(network, "auto", 64) == Packing(32, additive_mask=False)


def test_a_base_whose_positions_are_its_own_fails_the_trial() -> None:
    """Bloom counts its distances from the mask."""
    bloom = BloomModel(BloomConfig(vocab_size=90, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.15))
    assert choose_packing(PooledRewardModel(bloom, build_head(32, Head()), ("last",)), "auto", 64) is None


def test_an_encoder_fails_the_trial(tmp_path: Path) -> None:
    encoder = network_of(build_tiny_encoder_reward_model(tmp_path), Head("pooled", ("mean",)))
    assert choose_packing(encoder, "auto", 512) is None


def test_gates_see_the_prompt_alone_in_a_row_too(base: Path) -> None:
    network = network_of(base, HEADS["gated"])
    assert isinstance(network.head, GatedHead)
    with torch.no_grad():
        _, prompts = network.features(pack([group([5, 6, 7], [1, 2], [3]).items], CPU))
    assert torch.allclose(prompts[0], prompts[1], atol=1e-6)


def test_rendered_completions_share_their_prompt(task: Task) -> None:
    """What a chat template puts around a prompt is found by its ids."""
    groups = read_comparisons([str(task.rankings)], False, Skipped())
    trainable = load_trainable(tasks.options(task.decoder, Path("run"), [task.rankings], tuning="full"))
    for found in encode_groups(groups, trainable.renderer):
        shared = shared_length(found.items)
        assert shared >= found.items[0].completion_start


def test_a_training_is_the_same_packed_or_not(task: Task, tmp_path: Path) -> None:
    logs = []
    for packing in ("auto", "off"):
        chosen = {"tuning": "full", "learning_rate": 3e-3, "epochs": 2.0, "global_batch_size": 6, "packing": packing}
        train_reward_model(tasks.options(task.decoder, tmp_path / packing, [task.rankings], **chosen))
        logs.append(tasks.read_log(tmp_path / packing))
    assert len(logs[0]) == len(logs[1]) == 8
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
