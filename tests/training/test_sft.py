"""Supervised fine-tuning: it learns, a step is a step however it is cut up, and a killed run goes on exactly."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from feedback.jsonl import Skipped
from tests.training import policy_tasks, tasks
from tests.training.conftest import Task
from training.conversations import encode_prompt
from training.options import OptionsError
from training.policies import load_policy
from training.sft import SftOptions, encode_demonstrations, read_demonstrations, train_sft


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("demonstrations")
    train = policy_tasks.write_demonstrations(home / "train.jsonl", 64, seed=1)
    return train, policy_tasks.write_demonstrations(home / "validation.jsonl", 10, seed=2)


def options(task: Task, output: Path, files: tuple[Path, Path], **more: Any) -> SftOptions:
    return policy_tasks.options(SftOptions, task.decoder, output, *files, **more)


def test_demonstrations_are_learnt_and_the_policy_answers_as_they_do(
    task: Task, files: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = train_sft(options(task, tmp_path / "run", files, epochs=6, sample_tokens=8))
    losses = [line["validation_loss"] for line in tasks.read_log(tmp_path / "run") if "validation_loss" in line]
    assert min(losses) < 0.5 * losses[0]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    policy = load_policy(str(folder), tuning="frozen")
    ids = torch.tensor([encode_prompt(policy, [{"role": "user", "content": "two one"}])])
    written = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert policy.tokenizer.decode(written, skip_special_tokens=True).startswith("the ")
    assert int(written[-1]) in policy.stop_ids, "it has learnt where to stop, and the folder says so"
    shown = policy_tasks.samples(tmp_path / "run")
    assert {line["step"] for line in shown} == {4 * n for n in range(1, 13)}
    assert sum(line["completion"].startswith("the ") for line in shown[-4:]) >= 3


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_an_adapter_learns_and_is_what_the_folder_holds(
    merge: bool, task: Task, files: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = {"tuning": "lora", "learning_rate": 1e-2, "lora": {"rank": 16, "dropout": 0.0}, "merge_adapter": merge}
    chosen = options(task, tmp_path / "run", files, epochs=3, num_samples=0, **settings)
    folder = train_sft(chosen)
    assert (folder / "adapter_config.json").exists() != merge
    losses = [line["validation_loss"] for line in tasks.read_log(tmp_path / "run") if "validation_loss" in line]
    assert min(losses) < 0.8 * losses[0]
    assert mean_loss(folder, chosen, chosen.validation)[0] == pytest.approx(min(losses), rel=1e-4)


def test_s3_a_step_is_the_mean_over_its_tokens_however_it_is_cut_up(
    task: Task, files: tuple[Path, Path], tmp_path: Path
) -> None:
    """16 x 1 = 8 x 2 = 1 x 16, packed and padded."""
    logs = []
    for number, (tokens, packing) in enumerate([(1, "off"), (60, "off"), (9999, "off"), (60, "auto"), (9999, "auto")]):
        run = tmp_path / str(number)
        chosen = {"micro_batch_tokens": tokens, "packing": packing, "epochs": 1, "global_batch_size": 16}
        train_sft(options(task, run, files, num_samples=0, **chosen))
        logs.append(tasks.read_log(run))
    for log in logs[1:]:
        assert len(log) == len(logs[0])
        for ours, first in zip(log, logs[0], strict=True):
            assert ours == pytest.approx(first, rel=1e-5)


def test_the_first_loss_is_the_mean_over_completion_tokens(
    task: Task, files: tuple[Path, Path], tmp_path: Path
) -> None:
    """By the definition, one conversation at a time."""
    chosen = options(task, tmp_path / "run", files, global_batch_size=64, epochs=1)
    loss, count = mean_loss(task.decoder, chosen, chosen.train)
    train_sft(chosen)
    first = next(line for line in tasks.read_log(tmp_path / "run") if "loss" in line)
    assert first["loss"] == pytest.approx(loss, rel=1e-5)
    assert first["completion_tokens"] == count


def mean_loss(base: Path, chosen: SftOptions, data: list[str]) -> tuple[float, int]:
    """Over the completion tokens of files, one conversation at a time, with their number."""
    policy = load_policy(str(base), tuning="frozen")
    total, count = 0.0, 0
    for _, item in encode_demonstrations(policy, read_demonstrations(data, False, Skipped()), chosen, Skipped()):
        with torch.no_grad():
            logprobs = policy.model(torch.tensor([item.ids])).logits[0].log_softmax(-1)
        for at, counts in enumerate(item.completion_mask):
            if counts:
                total -= float(logprobs[at - 1, item.ids[at]])
                count += 1
    return total / count, count


@pytest.mark.parametrize(("sharding", "tuning"), [("none", "full"), ("fsdp2", "full"), ("fsdp2", "lora")])
def test_s3_two_processes_train_the_same_policy(
    sharding: str, tuning: str, task: Task, tmp_path: Path, files: tuple[Path, Path]
) -> None:
    """Also with a last batch of one demonstration: one process has no part in it."""
    train = policy_tasks.write_demonstrations(tmp_path / "train.jsonl", 9, seed=6)

    def chosen(name: str, **more: Any) -> SftOptions:
        settings = {"tuning": tuning, "global_batch_size": 4, "epochs": 2, "eval_every": 3, "micro_batch_tokens": 40}
        return options(task, tmp_path / name, (train, files[1]), sample_tokens=4, **settings, **more)

    run = policy_tasks.on_two_processes("sft", chosen("two", sharding=sharding))
    train_sft(chosen("one"))
    ours, theirs = tasks.read_log(tmp_path / "one"), tasks.read_log(run)
    assert len(ours) == len(theirs) == 6 + 3
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    weights, others = policy_tasks.saved_weights(tmp_path / "one"), policy_tasks.saved_weights(run)
    assert weights.keys() == others.keys()
    assert all(torch.allclose(weights[name], others[name], atol=1e-5) for name in weights)
    assert policy_tasks.samples(run) == policy_tasks.samples(tmp_path / "one")


def test_a_sharded_run_goes_on_exactly(task: Task, files: tuple[Path, Path], tmp_path: Path) -> None:
    """From the checkpoint before the last, as if it had been killed behind it."""
    run = tmp_path / "run"
    chosen = options(task, run, files, sharding="fsdp2", epochs=0.7, num_samples=0)
    policy_tasks.on_two_processes("sft", chosen)
    log, weights = tasks.read_log(run), policy_tasks.saved_weights(run)
    assert [path.name for path in sorted((run / "checkpoints").glob("step-*"))] == ["step-0000003", "step-0000006"]
    shutil.rmtree(run / "checkpoints" / "step-0000006")
    shutil.rmtree(run / "policy")
    policy_tasks.on_two_processes("sft", chosen)
    assert tasks.read_log(run) == log
    again = policy_tasks.saved_weights(run)
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_a_killed_run_goes_on_exactly(task: Task, files: tuple[Path, Path], tmp_path: Path) -> None:
    """With dropout, so that chance has a part in it."""

    def chosen(name: str) -> SftOptions:
        settings = {"tuning": "lora", "lora": {"dropout": 0.3}, "epochs": 3, "num_samples": 1, "sample_tokens": 4}
        return options(task, tmp_path / name, files, **settings)

    train_sft(chosen("unbroken"))
    policy_tasks.killed_run("sft", chosen("killed"), killed_at=8)
    train_sft(chosen("killed"))
    assert tasks.read_log(tmp_path / "killed") == tasks.read_log(tmp_path / "unbroken")
    assert list(tasks.step_losses(tmp_path / "killed")) == list(range(1, 25))
    assert policy_tasks.samples(tmp_path / "killed") == policy_tasks.samples(tmp_path / "unbroken")
    unbroken, resumed = (policy_tasks.saved_weights(tmp_path / name) for name in ("unbroken", "killed"))
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_training_stops_early_and_keeps_the_best_weights(task: Task, files: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_sft(options(task, run, files, epochs=20, learning_rate=3e-2, eval_every=2, patience=2, num_samples=0))
    losses = {int(line["step"]): line["validation_loss"] for line in tasks.read_log(run) if "validation_loss" in line}
    best_step = min(losses, key=lambda step: losses[step])
    assert max(losses) == best_step + 4 < 160, "stops after two validations without a better one"
    kept = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    saved = policy_tasks.saved_weights(run)
    assert all(torch.equal(saved[name], kept[name]) for name in saved)


def test_activations_can_be_computed_again(task: Task, files: tuple[Path, Path], tmp_path: Path) -> None:
    for name, recompute in (("plain", False), ("again", True)):
        train_sft(options(task, tmp_path / name, files, epochs=0.5, num_samples=0, gradient_checkpointing=recompute))
    ours, theirs = tasks.read_log(tmp_path / "plain"), tasks.read_log(tmp_path / "again")
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, rel=1e-5)


def test_half_precision_learns_about_the_same(task: Task, files: tuple[Path, Path], tmp_path: Path) -> None:
    for precision in ("no", "bf16"):
        train_sft(options(task, tmp_path / precision, files, epochs=1, num_samples=0, mixed_precision=precision))
    ours, theirs = tasks.step_losses(tmp_path / "bf16"), tasks.step_losses(tmp_path / "no")
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=0.02)
    assert ours != theirs
    assert all(value.dtype == torch.float32 for value in policy_tasks.saved_weights(tmp_path / "bf16").values())


def test_what_cannot_be_trained_is_said_and_leaves_no_folder(
    task: Task, files: tuple[Path, Path], tmp_path: Path
) -> None:
    empty = tasks.write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(OptionsError, match="no demonstration"):
        train_sft(options(task, tmp_path / "run", (empty, files[1])))
    odd = tasks.write_lines(tmp_path / "odd.jsonl", [{"id": "x7", "prompt": "a", "completion": "\ud800"}])
    with pytest.raises(OptionsError, match=r"demonstration x7: .*surrogate"):
        train_sft(options(task, tmp_path / "run", (odd, files[1])))
    with pytest.raises(OptionsError, match=r"sharding: fsdp2 .* use torchrun"):
        train_sft(options(task, tmp_path / "run", files, sharding="fsdp2"))
    assert not (tmp_path / "run" / "policy").exists()


def test_a_run_that_diverges_says_so(task: Task, files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="learning_rate: the loss of step"):
        train_sft(options(task, tmp_path / "run", files, learning_rate=1e30, epochs=4, num_samples=0))
    assert not (tmp_path / "run" / "policy").exists()
    assert all(math.isfinite(line["loss"]) for line in tasks.read_log(tmp_path / "run") if "loss" in line)


def test_a_finished_run_is_not_trained_again(task: Task, files: tuple[Path, Path], tmp_path: Path) -> None:
    train_sft(options(task, tmp_path / "run", files, epochs=0.2, num_samples=0))
    with pytest.raises(OptionsError, match="holds a finished run"):
        train_sft(options(task, tmp_path / "run", files, epochs=0.2, num_samples=0))
