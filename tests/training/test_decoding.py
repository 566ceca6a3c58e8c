"""Sampling: the distribution that is asked for, whatever the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from tests.fakes.models import build_tiny_causal_lm
from training.decoding import decode, draw, uniforms
from training.policies import Policy, load_policy

PROMPTS = [[5, 6, 7], [9] * 8, [30, 4], [11, 12, 13, 14, 15]]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    base = build_tiny_causal_lm(tmp_path_factory.mktemp("base"), family=request.param)
    return load_policy(str(base), tuning="frozen")


def written(policy: Policy, prompts: list[list[int]], rows: list[int], count: int = 24, **more: Any) -> list[list[int]]:
    told: dict[str, Any] = {"temperature": 1.0, "stop_ids": policy.stop_ids, "pad_id": policy.pad_id, **more}
    return decode(policy.model, prompts, uniforms(0, "test", rows, count), **told)


def test_p1_tokens_are_drawn_from_logits_over_the_temperature() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    chance = (torch.arange(10_000) + 0.5) / 10_000
    drawn = draw(logits.expand(10_000, -1), chance.double(), 0.5)
    shares = torch.bincount(drawn, minlength=4) / 10_000
    assert torch.allclose(shares, (logits[0] / 0.5).softmax(-1), atol=1e-4)


def test_the_ends_of_the_line_are_tokens_that_can_be() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    assert draw(logits, torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64), 1.0).tolist() == [1, 2]


def test_p2_generation_settings_of_the_checkpoint_do_not_leak(policy: Policy) -> None:
    plain = written(policy, PROMPTS, [0, 1, 2, 3])
    settings = policy.model.generation_config
    settings.do_sample, settings.top_k, settings.temperature, settings.repetition_penalty = True, 1, 0.01, 9.0
    assert written(policy, PROMPTS, [0, 1, 2, 3]) == plain
    assert len({tuple(one) for one in plain}) == 4


def test_p4_padding_and_neighbours_change_nothing(policy: Policy) -> None:
    together = written(policy, PROMPTS, [0, 1, 2, 3])
    alone = [written(policy, [prompt], [row])[0] for row, prompt in enumerate(PROMPTS)]
    assert together == alone


def test_rows_that_ended_are_dropped_and_the_others_go_on(policy: Policy) -> None:
    free = written(policy, PROMPTS, [0, 1, 2, 3])
    # The third token of the first three rows ends them: the last one is left alone in the batch.
    ends = {one[2] for one in free[:3]} - set(free[3])
    assert len(ends) > 1
    cut = written(policy, PROMPTS, [0, 1, 2, 3], stop_ids=ends)
    assert cut[3] == free[3]
    for whole, part in zip(free[:3], cut[:3], strict=True):
        length = next((at + 1 for at, token in enumerate(whole) if token in ends), len(whole))
        assert part == whole[:length], "up to and with the end token"


def test_p19_each_row_has_its_own_chance_wherever_it_is_drawn() -> None:
    whole = uniforms(1, "rollout/0", range(6), 5)
    shares = [uniforms(1, "rollout/0", range(rank, 6, 2), 5) for rank in (0, 1)]
    assert torch.equal(torch.stack(shares, dim=1).reshape(6, 5), whole)
    assert len(whole.unique()) == 30
    assert not torch.equal(uniforms(2, "rollout/0", range(6), 5), whole)
    assert not torch.equal(uniforms(1, "rollout/1", range(6), 5), whole)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_recomputes_activations_writes_the_same(family: Literal["llama", "gpt2"], tmp_path: Path) -> None:
    base = str(build_tiny_causal_lm(tmp_path / "base", family=family))
    plain = load_policy(base, tuning="full")
    recomputing = load_policy(base, tuning="full", gradient_checkpointing=True)
    assert written(recomputing, PROMPTS, [0, 1, 2, 3]) == written(plain, PROMPTS, [0, 1, 2, 3])
    assert recomputing.model.training, "as it was"
