"""Policy, reference and value model in each memory mode: one function, however its weights are shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from reward.model import load_reward_model
from tests.fakes.models import build_tiny_causal_lm, build_tiny_encoder_reward_model, build_tiny_reward_model
from tests.training import ppo_tasks
from training.hydra import split
from training.options import OptionsError
from training.policies import load_policy
from training.ppo_parts import PpoParts
from training.ppo_update import Evaluation, UpdateOptions, build_experience, update
from training.rollouts import rollout_of
from training.sequences import TokenSequence, collate_sequences
from training.value_models import RewardValues

SEQUENCES = [
    TokenSequence([5, 6, 7], [20, 21, 22, 3]),
    TokenSequence([8, 9, 10, 11, 12, 13], [30]),
    TokenSequence([14], [40, 41, 42, 43, 44]),
    TokenSequence([15, 16], [50, 3]),
]
MODES: dict[str, dict[str, Any]] = {
    "lora": {"tuning": "lora"},
    "top_layers": {"tuning": "top_layers"},
    "full": {"tuning": "full"},
    "full, recomputed": {"tuning": "full", "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_causal_lm(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.fixture(params=MODES)
def parts(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> PpoParts:
    return ppo_tasks.parts(base, tmp_path, temperature=0.7, **MODES[request.param])


def learnt(parts: PpoParts, epochs: int = 3) -> None:
    """Some updates on completions that are all good to the policy's surprise."""
    frozen = parts.actors.freeze(SEQUENCES)
    options = UpdateOptions(ppo_epochs=epochs, gae_lambda=1.0)
    rollout = rollout_of(frozen, torch.tensor([1.0, -1.0, 2.0, -2.0]), lambda scores: scores)
    parts.learner.rows = frozen
    update(parts.learner, build_experience(rollout, options, 0.1), options, [[0, 1, 2, 3]] * epochs)


def alone(model: Any, sequence: TokenSequence, temperature: float) -> Tensor:
    """Log-probabilities by the plainest way there is: one row, no padding, the whole logits."""
    ids = torch.tensor([[*sequence.prompt, *sequence.completion]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].float() / temperature
    logprobs = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
    return logprobs[len(sequence.prompt) - 1 :]


def test_p1_p4_logprobs_are_those_of_a_plain_pass_over_the_temperature(parts: PpoParts) -> None:
    model = parts.actors.policy.model
    for sequence, row in zip(SEQUENCES, parts.actors.freeze(SEQUENCES), strict=True):
        expected = alone(model, sequence, 0.7)
        assert torch.allclose(row.old_logprobs, expected, atol=2e-6)
        assert not torch.allclose(row.old_logprobs, alone(model, sequence, 1.0), atol=1e-2)


def test_p3_p5_the_update_begins_where_the_rollout_was(parts: PpoParts) -> None:
    frozen = parts.actors.freeze(SEQUENCES)
    now = parts.actors.evaluate(frozen)
    for place, row in enumerate(frozen):
        count = len(row.old_logprobs)
        assert torch.equal(now.logprobs[place, :count].detach(), row.old_logprobs)
        assert torch.allclose(now.values[place, :count].detach(), row.old_values)
        assert torch.allclose(row.old_logprobs, row.ref_logprobs, atol=1e-6), "nothing is learnt yet"
    assert now.logprobs.requires_grad and now.values.requires_grad


def test_p21_the_reference_stays_and_the_policy_moves(parts: PpoParts) -> None:
    before = parts.actors.freeze(SEQUENCES)
    untouched = {n: p.clone() for n, p in parts.actors.policy.model.named_parameters() if not p.requires_grad}
    learnt(parts)
    after = parts.actors.freeze(SEQUENCES)
    assert all(torch.equal(a.ref_logprobs, b.ref_logprobs) for a, b in zip(after, before, strict=True))
    assert not torch.allclose(after[0].old_logprobs, before[0].old_logprobs, atol=1e-3)
    assert not torch.allclose(after[0].old_values, before[0].old_values, atol=1e-3)
    now = dict(parts.actors.policy.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in untouched.items())


def test_the_whole_model_is_the_one_that_learnt(parts: PpoParts) -> None:
    """What is sampled from and saved is `policy.model`, also where only its top was run in the update."""
    learnt(parts)
    for sequence, row in zip(SEQUENCES, parts.actors.freeze(SEQUENCES), strict=True):
        assert torch.allclose(row.old_logprobs, alone(parts.actors.policy.model, sequence, 0.7), atol=2e-6)


def test_p9_what_stands_in_the_padding_does_not_count(parts: PpoParts) -> None:
    """Alone, or beside longer ones: the same numbers and gradients."""

    def gradient_of(groups: list[list[TokenSequence]]) -> Tensor:
        for group in groups:
            now = parts.actors.evaluate(parts.actors.freeze(group))
            (now.logprobs.sum() + now.values.sum()).backward()  # type: ignore[no-untyped-call]
        found = torch.cat([p.grad.flatten() for p in parts.actors.policy_parameters() if p.grad is not None])
        for parameter in parts.actors.policy_parameters():
            parameter.grad = None
        return found

    together, apart = gradient_of([SEQUENCES]), gradient_of([[one] for one in SEQUENCES])
    assert torch.allclose(together, apart, rtol=1e-3, atol=1e-5 * float(apart.abs().max()))


@pytest.mark.parametrize("tuning", ["lora", "top_layers", "full"])
def test_s5_no_dropout_is_left(tuning: str, tmp_path: Path) -> None:
    base = build_tiny_causal_lm(tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}), encoding="utf-8")
    parts = ppo_tasks.parts(base, tmp_path, tuning=tuning, lora={"dropout": 0.5}, gradient_checkpointing=True)
    parts.actors.policy.model.train()
    first, second = (parts.actors.freeze(SEQUENCES)[0] for _ in range(2))
    assert torch.equal(first.old_logprobs, second.old_logprobs)
    assert torch.equal(first.ref_logprobs, second.ref_logprobs)
    assert torch.allclose(first.old_logprobs, first.ref_logprobs, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("top_layers", [1])
def test_trunk_and_top_are_the_whole(family: Any, top_layers: int, tmp_path: Path) -> None:
    model = load_policy(str(build_tiny_causal_lm(tmp_path, family=family)), tuning="full").model.eval()
    hydra = split(model, top_layers)
    batch = collate_sequences(SEQUENCES, 0, torch.device("cpu"))
    told = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    below = hydra.below(batch.input_ids, batch.attention_mask, batch.position_ids)
    with torch.no_grad():
        whole, halves = model(input_ids=batch.input_ids, **told), hydra.top(inputs_embeds=below, **told)
    kept = batch.attention_mask.bool()
    assert torch.allclose(whole.logits[kept], halves.logits[kept], atol=1e-5)
    assert {name.split(".layers.")[1][0] for name, p in model.named_parameters() if p.requires_grad} == {"1"}


@pytest.mark.parametrize("top_layers", [1, 2, 3])
def test_layers_of_several_kinds_stay_what_they_are(top_layers: int) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=16,
            layer_types=kinds,
            initializer_range=0.3,
        )
    ).eval()
    hydra = split(model, top_layers)
    ids, positions = torch.randint(0, 64, (1, 60)), torch.arange(60)[None]
    mask = torch.ones_like(ids)
    told: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    below = hydra.below(ids, mask, positions)
    with torch.no_grad():
        whole = model(input_ids=ids, **told).logits
        for top in (hydra.top, hydra.reference_top):
            assert torch.allclose(top(inputs_embeds=below, **told).logits, whole, atol=1e-5)


def test_models_that_cannot_be_cut_are_refused(base: Path, tmp_path: Path) -> None:
    gpt2 = load_policy(str(build_tiny_causal_lm(tmp_path, family="gpt2")), tuning="full").model
    with pytest.raises(OptionsError, match="GPT2LMHeadModel cannot be cut"):
        split(gpt2, 1)
    with pytest.raises(OptionsError, match="must be from 1 to 1"):
        split(load_policy(str(base), tuning="full").model, 2)


def test_a_value_model_starts_as_the_reward_model(base: Path, reward_model: Path, tmp_path: Path) -> None:
    parts = ppo_tasks.parts(base, tmp_path, value_base=str(reward_model), score_shift=0.5, score_scale=2.0)
    assert isinstance(parts.actors.value, RewardValues)
    model = load_reward_model(str(reward_model), device="cpu")
    sequence = SEQUENCES[2]
    (row,) = parts.actors.freeze([sequence])
    for place in range(len(sequence.completion)):
        ids = [*sequence.prompt, *sequence.completion[:place]]
        with torch.no_grad():
            hidden = model.network.backbone(torch.tensor([ids])).last_hidden_state  # type: ignore[union-attr, operator]
            raw = float(model.network.head(hidden[:, -1]))  # type: ignore[union-attr, operator]
        scale = model.manifest.normalisation
        assert float(row.old_values[place]) == pytest.approx(((raw - scale.mean) / scale.std - 0.5) * 2, abs=1e-4)
    before = row.old_values.clone()
    learnt(parts)
    assert not torch.allclose(parts.actors.freeze([sequence])[0].old_values, before, atol=1e-3)


def test_reward_models_that_give_no_value_at_each_token_are_refused(base: Path, tmp_path: Path) -> None:
    encoder = build_tiny_encoder_reward_model(tmp_path / "encoder")
    with pytest.raises(OptionsError, match="does not give a value at each token"):
        ppo_tasks.parts(base, tmp_path, value_base=str(encoder))
    other = build_tiny_reward_model(tmp_path / "other", vocab_size=350)
    with pytest.raises(OptionsError, match="are not the policy's"):
        ppo_tasks.parts(base, tmp_path, value_base=str(other))
    with pytest.raises(OptionsError, match="value_base"):
        ppo_tasks.parts(base, tmp_path, value_base=str(tmp_path / "nowhere"))


def test_p15_each_network_has_its_own_rate_and_clipping(base: Path, tmp_path: Path) -> None:
    parts = ppo_tasks.parts(base, tmp_path, learning_rate=0.0 + 1e-9, value_learning_rate=0.1, max_grad_norm=1e-3)
    policy, value = (
        [p.clone() for p in which] for which in (parts.actors.policy_parameters(), parts.actors.value_parameters())
    )
    frozen = parts.actors.freeze(SEQUENCES)
    parts.learner.rows = frozen

    def loss_of(now: Evaluation, rows: Tensor) -> Tensor:
        return 100 * now.logprobs.sum() + now.values.sum()

    parts.learner.accumulate(torch.arange(4), loss_of)
    norms = parts.learner.step()
    assert norms.policy > 1 and norms.value > 1e-3
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(policy, parts.actors.policy_parameters(), strict=True))
    assert any(not torch.allclose(a, b, atol=1e-2) for a, b in zip(value, parts.actors.value_parameters(), strict=True))


def test_a_gradient_that_is_no_number_is_not_stepped_along(base: Path, tmp_path: Path) -> None:
    learner = (found := ppo_tasks.parts(base, tmp_path)).learner
    before = [parameter.clone() for parameter in found.actors.policy_parameters()]
    learner.rows = found.actors.freeze(SEQUENCES)
    learner.accumulate(torch.arange(4), lambda now, rows: now.logprobs.sum() * torch.nan)
    with pytest.raises(OptionsError, match=r"^learning_rate: the gradient is nan; .* Try a lower rate"):
        learner.step()
    assert all(torch.equal(*pair) for pair in zip(before, found.actors.policy_parameters(), strict=True))


def test_p20_adam_is_given_a_large_eps(base: Path, tmp_path: Path) -> None:
    """With 1e-5 a first step on a gradient of 1e-6 is a tenth of the rate, not the whole of it."""
    parts = ppo_tasks.parts(base, tmp_path)
    weight = parts.actors.value_parameters()[0]
    before = weight.detach().clone()

    def loss_of(now: Evaluation, rows: Tensor) -> Tensor:
        return 1e-6 * weight.sum() + 0 * now.logprobs.sum()

    parts.learner.rows = parts.actors.freeze(SEQUENCES)
    parts.learner.accumulate(torch.arange(4), loss_of)
    parts.learner.step()
    rate = ppo_tasks.options(base, tmp_path, tmp_path).value_learning_rate
    assert torch.allclose(before - weight, torch.full_like(weight, rate * 1e-6 / (1e-6 + 1e-5)), rtol=1e-2)


def test_p14_micro_batches_give_the_gradient_of_the_whole(base: Path, tmp_path: Path) -> None:
    found = []
    for tokens in (10_000, 1):
        parts = ppo_tasks.parts(base, tmp_path, tuning="lora", micro_batch_tokens=tokens)
        learnt(parts, epochs=2)
        found.append(torch.cat([p.detach().flatten() for p in parts.actors.policy_parameters()]))
    assert torch.allclose(found[0], found[1], atol=2e-5)
