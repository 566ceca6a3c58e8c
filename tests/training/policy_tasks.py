"""What trainers of policies are tested on: data that a tiny model learns in seconds, and runs in other processes."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import random
import signal
import socket
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file

from tests.training import tasks
from training.distill import DistillOptions, distill
from training.dpo import DpoOptions, train_dpo
from training.options import PolicyOptions, StepOptions
from training.ppo import train_ppo
from training.ppo_options import PpoOptions
from training.rlhf import Tools, train_rlhf
from training.rlhf_options import RlhfOptions
from training.sft import SftOptions, train_sft
from winnow.commands.distilling import draw_with, score_with
from winnow.commands.rlhf_drawing import drawer

OptionsT = TypeVar("OptionsT", bound=PolicyOptions)


def write_demonstrations(path: Path, count: int, *, seed: int) -> Path:
    """The answer repeats the last word of the question, between two that never change."""
    rng = random.Random(seed)
    records = []
    for _ in range(count):
        asked = rng.choices(tasks.WORDS, k=rng.randint(2, 7))
        records.append({"prompt": " ".join(asked), "completion": f"the {asked[-1]} dog"})
    return tasks.write_lines(path, records)


def options(kind: type[OptionsT], base: Path, output: Path, train: Path, validation: Path, **more: Any) -> OptionsT:
    """Settings for a tiny model on the CPU."""
    chosen: dict[str, Any] = {
        "base": str(base),
        "output": str(output),
        "train": [str(train)],
        "validation": [str(validation)],
        "device": "cpu",
        "mixed_precision": "no",
        "max_length": 96,
        "seed": 3,
        "learning_rate": 3e-3,
        "global_batch_size": 8,
        "micro_batch_tokens": 256,
        "eval_every": 4,
        "save_every": 3,
    }
    return kind.model_validate({**chosen, **more})


def on_one_process(method: str, chosen: StepOptions | RlhfOptions) -> Path:
    """Runs a trainer in a process of its own; returns the run folder."""
    process = _started(method, chosen, {})
    process.join()
    assert process.exitcode == 0
    return Path(chosen.output)


def on_two_processes(method: str, chosen: StepOptions | RlhfOptions) -> Path:
    """Runs a trainer in two processes, as torchrun starts them; returns the run folder."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [_started(method, chosen, {**world, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return Path(chosen.output)


def killed_run(method: str, chosen: StepOptions, *, killed_at: int) -> None:
    """Runs a trainer in a process that is killed (-9) as soon as it has logged step `killed_at`.

    Its log is a pipe, so that the kill answers an event. The pipe takes only some 25 lines that nobody reads: the
    process cannot run on to its end before the kill.
    """
    run = Path(chosen.output)
    run.mkdir()
    log = run / "log.jsonl"
    os.mkfifo(log)
    process = _started(method, chosen, {})
    lines: list[bytes] = []
    with log.open("rb", buffering=0) as pipe:
        if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux; elsewhere pipes are as small as that by themselves
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
        while not lines or f'"step": {killed_at}'.encode() not in lines[-1]:
            lines.append(pipe.readline())
            assert lines[-1], "the run ended by itself"
        process.kill()
        process.join()
        lines += pipe.readlines()
    assert process.exitcode == -signal.SIGKILL
    assert not (run / "policy").exists()
    log.unlink()
    log.write_bytes(b"".join(lines))


def _started(method: str, chosen: StepOptions | RlhfOptions, environment: dict[str, str]) -> Any:
    # Forked from a server that has imported the libraries once: a process from nothing takes seconds to do so.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.sft", "training.dpo", "training.ppo", "peft"])
    process = context.Process(target=_run, args=(method, chosen.model_dump(mode="json"), environment), daemon=True)
    process.start()
    return process


def _run(method: str, settings: dict[str, Any], environment: dict[str, str]) -> None:
    """In a process of its own: one trainer, with one thread, so that sums are added in one order."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    match method:
        case "sft":
            train_sft(SftOptions.model_validate(settings))
        case "dpo":
            train_dpo(DpoOptions.model_validate(settings))
        case "ppo":
            train_ppo(PpoOptions.model_validate(settings))
        case "distill":
            asked = DistillOptions.model_validate(settings)
            distill(asked, draw_with(asked), score_with(asked))
        case "rlhf":
            train_rlhf(RlhfOptions.model_validate(settings), Tools(drawer("cpu")))
        case _:
            raise ValueError(method)
    if "RANK" in environment:
        torch.distributed.destroy_process_group()


def saved_weights(run: Path) -> dict[str, torch.Tensor]:
    """Of a finished policy, whole or adapters."""
    return loaded(run / "policy")


def loaded(place: Path) -> dict[str, torch.Tensor]:
    """Of a file, or of the one in a folder."""
    (file,) = place.glob("*model.safetensors") if place.is_dir() else [place]
    return load_file(file)


def log_without(run: Path, *names: str) -> list[dict[str, float]]:
    """Lines of a run's log without some metrics."""
    return [{key: value for key, value in line.items() if key not in names} for line in tasks.read_log(run)]


def samples(run: Path) -> list[dict[str, Any]]:
    """Texts that a run wrote at its validations."""
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
