"""Direct preference optimisation: the loss by hand, what is learnt, and a step that is a step however it is cut up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from feedback.jsonl import Skipped
from tests.training import policy_tasks, tasks
from tests.training.conftest import Task
from training.comparisons import read_comparisons
from training.conversations import encode_conversation
from training.dpo import DpoOptions, train_dpo
from training.losses import dpo_losses
from training.options import OptionsError
from training.policies import Policy, load_policy


def options(task: Task, output: Path, **more: Any) -> DpoOptions:
    files = more.pop("files", (task.train, task.validation))
    settings = {"beta": 0.1, "warmup_share": 0.0, "learning_rate": 1e-3, **more}
    return policy_tasks.options(DpoOptions, task.decoder, output, *files, **settings)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_loss_by_hand() -> None:
    """Equation 7 with numbers."""
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 3.0])
    found = dpo_losses(chosen, rejected, beta=0.5)
    assert found.tolist() == pytest.approx([-math.log(sigmoid(1.0)), -math.log(sigmoid(-2.5))])
    smooth = dpo_losses(chosen, rejected, beta=0.5, label_smoothing=0.1)
    assert smooth[0].item() == pytest.approx(-0.9 * math.log(sigmoid(1.0)) - 0.1 * math.log(sigmoid(-1.0)))
    offset = dpo_losses(chosen, rejected, beta=0.5, margins=torch.tensor([0.25, 0.0]))
    assert offset[0].item() == pytest.approx(-math.log(sigmoid(0.75)))


def test_the_loss_is_finite_far_out_and_starts_at_log_two() -> None:
    far = torch.tensor([1e4, -1e4])
    assert dpo_losses(far, -far, beta=1.0).isfinite().all()
    assert dpo_losses(torch.zeros(1), torch.zeros(1), beta=0.1).item() == pytest.approx(math.log(2))


def test_the_gradient_is_that_of_the_paper() -> None:
    """−β σ(r_l − r_w) on the chosen, its opposite on the rejected (section 4)."""
    chosen = torch.tensor([0.7], requires_grad=True)
    rejected = torch.tensor([0.2], requires_grad=True)
    dpo_losses(chosen, rejected, beta=0.3).sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    expected = 0.3 * sigmoid(-0.3 * 0.5)
    assert chosen.grad.item() == pytest.approx(-expected)
    assert rejected.grad.item() == pytest.approx(expected)


def logprob(policy: Policy, prompt: Any, completion: Any) -> float:
    """By definition, one conversation at a time."""
    item = encode_conversation(policy, prompt, completion)
    with torch.no_grad():
        logprobs = policy.model(torch.tensor([item.ids])).logits[0].log_softmax(-1)
    return sum(float(logprobs[at - 1, item.ids[at]]) for at, kept in enumerate(item.completion_mask) if kept)


def test_comparisons_are_learnt_and_the_metrics_are_what_they_say(task: Task, tmp_path: Path) -> None:
    chosen = options(task, tmp_path / "run", epochs=3, tuning="lora", lora={"rank": 8, "dropout": 0.0})
    chosen = chosen.model_copy(update={"learning_rate": 1e-2})
    folder = train_dpo(chosen)
    start, *log = tasks.read_log(tmp_path / "run")
    assert start["step"] == 0 and start["validation_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), "the first step is taken from the reference"
    assert log[0]["margin"] == pytest.approx(0, abs=1e-4) and log[0]["grad_norm"] > 0
    validations = [line for line in log if "validation_loss" in line]
    best = min(validations, key=lambda line: line["validation_loss"])
    assert best["validation_accuracy"] >= 0.9
    before, after = load_policy(str(task.decoder), tuning="frozen"), load_policy(str(folder), tuning="frozen")
    margins, losses = [], []
    for group in read_comparisons(chosen.validation, False, Skipped()):
        ratios = [logprob(after, group.prompt, c) - logprob(before, group.prompt, c) for c in group.completions]
        for pair in group.pairs:
            margins.append(0.1 * (ratios[pair.better] - ratios[pair.worse]))
            losses.append(math.log1p(math.exp(-margins[-1])))
    assert best["validation_margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    assert best["validation_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_reference_is_the_same_computed_before_or_with_adapters_off(task: Task, tmp_path: Path) -> None:
    """Also with dropout: a reference has none."""
    logs = []
    for reference in ("precomputed", "adapter_off"):
        settings = {"tuning": "lora", "lora": {"dropout": 0.3}, "epochs": 1, "learning_rate": 1e-2}
        train_dpo(options(task, tmp_path / reference, reference=reference, **settings))
        logs.append(tasks.read_log(tmp_path / reference))
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert not (tmp_path / "adapter_off" / "reference.safetensors").exists()


def test_a_step_is_the_mean_over_its_prompts_however_it_is_cut_up(task: Task, tmp_path: Path) -> None:
    """1 x 8 accumulated equals 8 x 1; rankings and preferences mixed; packed and padded."""
    train = [str(task.rankings), str(task.train)]
    logs = []
    for number, (tokens, packing) in enumerate([(1, "off"), (300, "off"), (9999, "off"), (300, "auto")]):
        run = tmp_path / str(number)
        chosen = options(task, run, epochs=0.4, micro_batch_tokens=tokens, packing=packing)
        train_dpo(chosen.model_copy(update={"train": train}))
        logs.append(tasks.read_log(run))
    assert logs[0][1]["pairs"] >= 8
    for log in logs[1:]:
        for ours, first in zip(log, logs[0], strict=True):
            assert ours == pytest.approx(first, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_processes_train_the_same_policy(sharding: str, task: Task, tmp_path: Path) -> None:
    """Also with a last batch of one prompt: one process has no part in it."""
    train = tasks.write_rankings(tmp_path / "train.jsonl", 9, seed=6)
    validation = tasks.write_preferences(tmp_path / "validation.jsonl", 5, seed=7)
    settings = {"files": (train, validation), "global_batch_size": 4, "epochs": 2, "eval_every": 3}
    run = policy_tasks.on_two_processes("dpo", options(task, tmp_path / "two", sharding=sharding, **settings))
    train_dpo(options(task, tmp_path / "one", **settings))
    ours, theirs = tasks.read_log(tmp_path / "one"), tasks.read_log(run)
    assert len(ours) == len(theirs) == 6 + 3
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5)
    weights, others = policy_tasks.saved_weights(tmp_path / "one"), policy_tasks.saved_weights(run)
    assert all(torch.allclose(weights[name], others[name], atol=1e-5) for name in weights)


def test_a_killed_run_goes_on_exactly(task: Task, tmp_path: Path) -> None:
    """With full tuning: the reference must not be computed anew from the trained weights."""

    def chosen(name: str) -> DpoOptions:
        return options(task, tmp_path / name, epochs=2)

    train_dpo(chosen("unbroken"))
    policy_tasks.killed_run("dpo", chosen("killed"), killed_at=8)
    train_dpo(chosen("killed"))
    assert tasks.read_log(tmp_path / "killed") == tasks.read_log(tmp_path / "unbroken")
    unbroken, resumed = (policy_tasks.saved_weights(tmp_path / name) for name in ("unbroken", "killed"))
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_what_cannot_be_trained_is_said(task: Task, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="adapter_off needs tuning: lora"):
        train_dpo(options(task, tmp_path / "run", reference="adapter_off"))
    tied = tasks.write_lines(tmp_path / "tied.jsonl", [{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]}])
    with pytest.raises(OptionsError, match="no decided comparison"):
        train_dpo(options(task, tmp_path / "run", files=(tied, task.validation)))
    assert not (tmp_path / "run").exists()
