"""A killed run goes on exactly: the same losses, and final weights that are equal bit by bit."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from feedback.jsonl import Skipped
from tests.training import tasks
from tests.training.conftest import KINDS, Task
from training.batches import encode_groups
from training.comparisons import read_comparisons
from training.features import compute_features, load_features
from training.models import load_trainable
from training.options import OptionsError, RewardOptions
from training.reward_model import train_reward_model

GRADIENT: dict[str, Any] = {
    "learning_rate": 3e-3,
    "global_batch_size": 16,
    "save_every": 3,
    "eval_every": 4,
    "epochs": 8,
}
KILLED_AT = 8
REPOSITORY = Path(__file__).resolve().parents[2]


def killed_run(chosen: RewardOptions, home: Path) -> None:
    """Runs the command in a process that is killed as soon as it has logged step `KILLED_AT`.

    Its log is a pipe, so that the kill answers an event. The pipe takes only some 25 lines that nobody
    reads: the process cannot run on to its end before the kill.
    """
    run = Path(chosen.output)
    run.mkdir()
    log = run / "log.jsonl"
    os.mkfifo(log)
    arguments = tasks.command("train", "reward", "--config", tasks.write_config(home / "config.yaml", chosen))
    with subprocess.Popen(arguments, env=tasks.environment(), stderr=subprocess.DEVNULL) as process:
        lines: list[bytes] = []
        with log.open("rb", buffering=0) as pipe:
            if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux; elsewhere pipes are as small as that by themselves
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
            while not lines or f'"step": {KILLED_AT}'.encode() not in lines[-1]:
                lines.append(pipe.readline())
                assert lines[-1], "the run ended by itself"
            process.send_signal(signal.SIGKILL)
            process.wait()
            lines += pipe.readlines()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "model").exists()
    log.unlink()
    log.write_bytes(b"".join(lines))


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "model").glob("*model.safetensors")
    return load_file(file)


@pytest.mark.parametrize(
    ("tuning", "more"), [("full", {}), ("lora", {"lora": {"dropout": 0.3}})], ids=["full", "lora with dropout"]
)
def test_a_killed_run_goes_on_exactly(tuning: str, more: dict[str, Any], task: Task, tmp_path: Path) -> None:
    def options(name: str) -> RewardOptions:
        return tasks.options(
            task.decoder, tmp_path / name, [task.train], [task.validation], tuning=tuning, **{**GRADIENT, **more}
        )

    train_reward_model(options("unbroken"))
    killed_run(options("killed"), tmp_path)
    (*_, newest) = sorted((tmp_path / "killed" / "checkpoints").glob("step-*"))
    assert "step-0000006" <= newest.name < "step-0000048", "killed half way"
    train_reward_model(options("killed"))

    assert tasks.read_log(tmp_path / "killed") == tasks.read_log(tmp_path / "unbroken")
    assert list(tasks.step_losses(tmp_path / "killed")) == list(range(1, 49))
    unbroken, resumed = final_weights(tmp_path / "unbroken"), final_weights(tmp_path / "killed")
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def _killed_after_one_chunk(config: str) -> None:
    """In a process of its own: computes features until the first chunk is on disk, and is killed there."""
    from training.options import load_options

    torch.set_num_threads(1)
    chosen = load_options(RewardOptions, Path(config))
    features_of(chosen, on_progress=lambda count: os.kill(os.getpid(), signal.SIGKILL))


def features_of(chosen: RewardOptions, **more: Any) -> Path:
    trainable = load_trainable(chosen)
    groups = encode_groups(read_comparisons(chosen.train, False, Skipped()), trainable.renderer)
    folder = Path(chosen.output) / "features"
    network: Any = trainable.network
    compute_features(network, groups, folder, device=torch.device("cpu"), max_tokens=chosen.micro_batch_tokens, **more)
    load_features(groups, folder)
    return folder


def test_features_of_a_killed_run_are_not_computed_again(task: Task, tmp_path: Path) -> None:
    def options(name: str) -> RewardOptions:
        return tasks.options(task.decoder, tmp_path / name, [task.train], [task.validation], **KINDS["head"])

    chosen = options("killed")
    config = tasks.write_config(tmp_path / "config.yaml", chosen)
    code = f"from {__name__} import _killed_after_one_chunk as run; run({str(config)!r})"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=tasks.environment(), check=False, timeout=100
    )
    assert process.returncode == -signal.SIGKILL
    (chunk,) = (tmp_path / "killed" / "features").glob("*.safetensors")
    before = chunk.stat()

    features_of(chosen)
    assert len(list(chunk.parent.glob("*.safetensors"))) == 2
    assert (chunk.stat().st_ino, chunk.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    resumed = train_reward_model(chosen)
    unbroken = train_reward_model(options("unbroken"))
    ours, theirs = (load_file(folder / "head.safetensors") for folder in (resumed, unbroken))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not chunk.parent.exists()


def test_features_of_other_data_are_not_taken(task: Task, tmp_path: Path) -> None:
    settings = KINDS["head"]
    first = features_of(tasks.options(task.decoder, tmp_path / "run", [task.train], **settings))
    stored = {path.name for path in first.iterdir()}
    features_of(tasks.options(task.decoder, tmp_path / "run", [task.opposite_train], **settings))
    assert len({path.name for path in first.iterdir()} - stored) == 2


def test_another_configuration_is_refused(task: Task, tmp_path: Path) -> None:
    def options(**more: Any) -> RewardOptions:
        return tasks.options(task.decoder, tmp_path / "run", [task.train], tuning="full", epochs=0.2, **more)

    train_reward_model(options())
    model = tmp_path / "run" / "model"
    with pytest.raises(OptionsError, match="holds a finished run"):
        train_reward_model(options())
    model.rename(tmp_path / "elsewhere")
    with pytest.raises(OptionsError, match="holds a run with another learning_rate, seed"):
        train_reward_model(options(learning_rate=1e-3, seed=4))


def test_a_wrong_setting_can_be_mended_in_place(task: Task, tmp_path: Path) -> None:
    """A run that never began claims no folder."""
    empty = tasks.write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(OptionsError, match="no decided comparison"):
        train_reward_model(tasks.options(task.decoder, tmp_path / "run", [empty]))
    with pytest.raises(OptionsError, match="base: cannot load"):
        train_reward_model(tasks.options(tmp_path, tmp_path / "run", [task.train]))
    assert not (tmp_path / "run").exists()
    assert train_reward_model(tasks.options(task.decoder, tmp_path / "run", [task.train])).is_dir()


def test_the_best_weights_are_kept_and_training_stops(task: Task, tmp_path: Path) -> None:
    run = tmp_path / "run"
    chosen = tasks.options(
        task.decoder,
        run,
        [task.train],
        [task.validation],
        tuning="full",
        **{**GRADIENT, "learning_rate": 3e-2, "eval_every": 2, "patience": 2, "epochs": 20},
    )
    train_reward_model(chosen)
    accuracies = {int(e["step"]): e["validation_accuracy"] for e in tasks.read_log(run) if "validation_accuracy" in e}
    best = max(accuracies.values())
    best_step = min(step for step, accuracy in accuracies.items() if accuracy == best)
    assert max(accuracies) == best_step + 4, "stops after two validations without a better one"
    assert max(accuracies) < 20 * 6
    kept = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    saved = final_weights(run)
    trainable = load_trainable(chosen)
    names = {id(p): name for name, p in trainable.classifier.named_parameters()} if trainable.classifier else {}
    parameters = dict(trainable.network.named_parameters())
    assert all(torch.equal(saved[names[id(parameters[name])]], value) for name, value in kept.items())

    # Killed while the model was being written: going on trains no further.
    for file in (run / "model").iterdir():
        file.unlink()
    (run / "model").rmdir()
    train_reward_model(chosen)
    assert max(tasks.step_losses(run)) == max(accuracies)
    again = final_weights(run)
    assert all(torch.equal(saved[name], again[name]) for name in saved)
