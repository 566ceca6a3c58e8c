"""From training to answers: a policy that was just saved, behind `winnow serve --local-model`, best of N."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from tests.fakes.models import build_tiny_causal_lm, build_tiny_reward_model
from tests.fakes.processes import started
from training.policies import load_policy, save_policy


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    base = build_tiny_causal_lm(tmp_path / "base")
    save_policy(load_policy(str(base), tuning="lora"), tmp_path / "run" / "policy")
    return tmp_path / "run" / "policy"


def test_a_saved_adapter_is_served_best_of_n(policy: Path, tmp_path: Path) -> None:
    judge = build_tiny_reward_model(tmp_path / "judge")
    flags = ["--local-model", str(policy), "--reward-model", str(judge), "--best-of", "8", "--device", "cpu"]
    with started(*flags, OMP_NUM_THREADS="1") as (_, url), openai.OpenAI(base_url=url, api_key="none") as client:
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": "hello you"}],
            max_tokens=8,
            extra_body={"winnow": {"return_candidates": True}},
        )
    assert answer.model == "policy"
    candidates = answer.model_extra["winnow"]["candidates"] if answer.model_extra else []
    assert len(candidates) == 8
    # The default truncation_penalty: what the limit cut off loses a deviation.
    adjusted = {one["index"]: one["reward"] - (one["finish_reason"] == "length") for one in candidates if one["valid"]}
    best = {one["content"] for one in candidates if adjusted.get(one["index"]) == max(adjusted.values())}
    assert answer.choices[0].message.content in best
