"""PPO-ptx: language data in the same gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from feedback.jsonl import DataError
from tests.fakes.models import build_tiny_causal_lm
from tests.training import ppo_tasks
from training.language_mix import read_mix
from training.options import OptionsError
from training.ppo_parts import PpoParts, build_parts
from training.ppo_update import Evaluation
from training.sequences import TokenSequence

TEXTS = [{"text": "one two three four"}, {"text": "five six seven"}]
DEMONSTRATION = {"prompt": "what is one", "completion": "two three"}
SEQUENCES = [TokenSequence([5, 6, 7], [20, 21, 3]), TokenSequence([8], [30, 31])]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_causal_lm(tmp_path_factory.mktemp("base"))


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def parts(base: Path, tmp_path: Path, **more: Any) -> PpoParts:
    torch.manual_seed(0)
    given = {"tuning": "full", "global_batch_size": 2, "ptx_ratio": 1.0, **more}
    return build_parts(Accelerator(cpu=True), ppo_tasks.options(base, tmp_path, tmp_path / "none", **given))


def gradient(found: PpoParts) -> Tensor:
    def loss_of(now: Evaluation, rows: Tensor) -> Tensor:
        return now.logprobs.square().mean() + now.values.mean()

    found.learner.rows = found.actors.freeze(SEQUENCES)
    found.learner.accumulate(torch.arange(2), loss_of)
    return torch.cat([p.grad.flatten() for p in found.actors.policy_parameters() if p.grad is not None])


def test_p17_the_gradient_is_that_of_ppo_plus_gamma_times_that_of_the_language_loss(base: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "mix.jsonl", *TEXTS)
    alone, mixed = parts(base, tmp_path), parts(base, tmp_path, ptx=[file], ptx_coef=3.0)
    with_mix = gradient(mixed)

    model = parts(base, tmp_path).actors.policy.model
    examples = read_mix([file], mixed.actors.policy, max_length=64, skipped=None)
    total, count = torch.zeros(()), 0
    for example in examples:
        ids = torch.tensor([example.ids])
        logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        total = total - logprobs.gather(1, ids[0, 1:, None]).sum()
        count += len(example.ids) - 1
    (total / count).backward()  # type: ignore[no-untyped-call]
    language = torch.cat([p.grad.flatten() for p in model.parameters()])
    expected = gradient(alone) + 3.0 * language
    assert torch.allclose(with_mix, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert mixed.learner.mix_loss == pytest.approx(float(total.detach()) / count, rel=1e-5)


def test_each_step_takes_the_next_examples(base: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "mix.jsonl", *TEXTS, DEMONSTRATION)
    found = parts(base, tmp_path, ptx=[file])
    assert found.mix is not None
    losses = []
    for _ in range(3):
        losses.append(found.mix.accumulate(Accelerator(cpu=True), found.actors))
    assert found.mix.taken == 6
    assert losses[0] != losses[1], "each example comes once in three, and the steps take two"


def test_what_counts_of_an_example(base: Path, tmp_path: Path) -> None:
    policy = parts(base, tmp_path).actors.policy
    text, demonstration = read_mix(
        [write(tmp_path / "mix.jsonl", TEXTS[0], DEMONSTRATION)], policy, max_length=64, skipped=None
    )
    assert text.completion_mask == [False] + [True] * (len(text) - 1)
    assert policy.tokenizer.decode(
        [token for token, kept in zip(demonstration.ids, demonstration.completion_mask, strict=True) if kept]
    ).startswith("two three")
    (cut,) = read_mix([write(tmp_path / "cut.jsonl", TEXTS[0])], policy, max_length=3, skipped=None)
    assert len(cut) == 3


def test_bad_language_data_is_refused(base: Path, tmp_path: Path) -> None:
    policy = parts(base, tmp_path).actors.policy
    with pytest.raises(DataError, match=r"bad.jsonl:1: text"):
        read_mix([write(tmp_path / "bad.jsonl", {"text": 3})], policy, max_length=64, skipped=None)
    with pytest.raises(OptionsError, match="ptx: no example"):
        read_mix([write(tmp_path / "empty.jsonl")], policy, max_length=64, skipped=None)
