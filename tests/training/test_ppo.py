"""PPO runs from start to end: they learn, stop, resume, and leave a policy that others can load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from feedback.jsonl import DataError
from reward.errors import ScoringError
from tests.fakes.models import build_tiny_causal_lm
from tests.training import ppo_tasks, tasks
from training.options import OptionsError, load_options
from training.ppo import num_iterations, train_ppo
from training.ppo_options import PpoOptions
from training.rollouts import batch_of_prompts

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "training" / "configs"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_causal_lm(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ppo_tasks.write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl", 12)


def metric(run: Path, name: str) -> dict[int, float]:
    return {int(line["step"]): line[name] for line in tasks.read_log(run) if name in line}


@pytest.mark.parametrize("tuning", ["lora", "top_layers"])
def test_it_learns_and_leaves_a_policy(tuning: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    many = ppo_tasks.write_prompts(tmp_path / "prompts.jsonl", 48)
    chosen = ppo_tasks.options(
        # Weights so spread that some tokens are likelier than others: there is something to choose between.
        build_tiny_causal_lm(tmp_path / "base", spread=1.0),
        run,
        many,
        tuning=tuning,
        eval_prompts=[str(many)],
        iterations=10,
        global_batch_size=48,
        num_minibatches=2,
        ppo_epochs=4,
        kl_coef=0.02,
        kl_target=8.0,
        learning_rate=1e-2,
        eval_every=5,
        ema_decay=0.5,
        ptx=[str(write_texts(tmp_path / "mix.jsonl"))],
        ptx_coef=0.01,
    )
    assert train_ppo(chosen) == run / "policy"
    scores = metric(run, "eval_score")
    assert list(scores) == [0, 5, 10]
    assert scores[10] > scores[0] + 0.05
    kl = metric(run, "eval_kl")
    assert kl[0] == pytest.approx(0, abs=1e-5)
    assert kl[10] > 0.1
    assert max(metric(run, "first_ratio_error").values()) < 1e-5, "P3"
    assert metric(run, "kl_coef")[10] != 0.02

    model = AutoModelForCausalLM.from_pretrained(run / "policy")
    assert AutoTokenizer.from_pretrained(run / "policy").chat_template
    assert model.generation_config.eos_token_id
    averaged = AutoModelForCausalLM.from_pretrained(run / "policy-ema")
    some = next(name for name, _ in model.named_parameters() if "lora_B" in name or ".layers.1.mlp" in name)
    assert not torch.equal(model.get_parameter(some), averaged.get_parameter(some))
    assert load_file(run / "value.safetensors")["outer.weight"].abs().max() > 0
    table = [json.loads(line) for line in (run / "samples" / "step-000010.jsonl").read_text().splitlines()]
    assert len(table) == 48 and {"prompt", "text", "score", "kl"} <= table[0].keys()
    assert list((run / "tensorboard").iterdir())
    page = (REPOSITORY / "docs" / "training-ppo.md").read_text(encoding="utf-8")
    logged = {name for line in tasks.read_log(run) for name in line} - {"step"}
    assert [name for name in sorted(logged) if f"`{name}`" not in page] == []
    with pytest.raises(OptionsError, match="holds a finished run"):
        train_ppo(chosen)


def write_texts(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": f"one two three {k}"}) + "\n" for k in range(5)), encoding="utf-8")
    return path


def killed_after(config: str, iteration: int) -> None:
    """In a process of its own: as the command does, until it would begin another iteration."""
    from training import ppo

    torch.set_num_threads(1)
    whole = ppo.batch_of_prompts

    def until(num_prompts: int, at: int, batch_size: int, seed: int) -> list[int]:
        if at == iteration:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(num_prompts, at, batch_size, seed)

    ppo.batch_of_prompts = until
    train_ppo(load_options(PpoOptions, Path(config)))


def test_a_killed_run_goes_on_exactly(base: Path, prompts: Path, tmp_path: Path) -> None:
    def options(name: str) -> PpoOptions:
        return ppo_tasks.options(
            base,
            tmp_path / name,
            prompts,
            tuning="lora",
            eval_prompts=[str(prompts)],
            iterations=6,
            num_minibatches=2,
            kl_target=1.0,
            kl_horizon=100.0,
            learning_rate=1e-2,
            warmup_share=0.3,
            save_every=2,
            eval_every=3,
            ema_decay=0.9,
            ptx=[str(write_texts(tmp_path / "mix.jsonl"))],
        )

    train_ppo(options("unbroken"))
    config = tasks.write_config(tmp_path / "config.yaml", options("killed"))  # type: ignore[arg-type]
    code = f"from {__name__} import killed_after; killed_after({str(config)!r}, 5)"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=tasks.environment(), check=False, timeout=100
    )
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "policy").exists()
    assert max(metric(tmp_path / "killed", "score")) == 5, "one iteration past its last checkpoint"
    train_ppo(options("killed"))
    assert tasks.read_log(tmp_path / "killed") == tasks.read_log(tmp_path / "unbroken")
    for file in ("policy/adapter_model.safetensors", "policy-ema/adapter_model.safetensors", "value.safetensors"):
        ours, theirs = (load_file(tmp_path / run / file) for run in ("killed", "unbroken"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(OptionsError, match="holds a finished run"):
        train_ppo(options("killed"))


def test_two_processes_give_what_one_does(base: Path, prompts: Path, tmp_path: Path) -> None:
    """P11, P19: other rows on each, the same advantages and the same weights."""

    def options(name: str) -> PpoOptions:
        return ppo_tasks.options(
            base,
            tmp_path / name,
            prompts,
            eval_prompts=[str(prompts)],
            num_minibatches=2,
            learning_rate=3e-3,
            ptx=[str(write_texts(tmp_path / "mix.jsonl"))],
        )

    train_ppo(options("one"))
    config = tasks.write_config(tmp_path / "config.yaml", options("two"))  # type: ignore[arg-type]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    subprocess.run(
        [*launch, "-m", "winnow", "train", "ppo", "--config", str(config)],
        env=tasks.environment(),
        check=True,
        timeout=110,
        capture_output=True,
    )
    one, two = (tasks.read_log(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two)
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    weights = [load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("one", "two")]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=2e-4) for name in weights[0])


def test_a_policy_that_strays_is_stopped_and_the_last_good_one_kept(base: Path, prompts: Path, tmp_path: Path) -> None:
    chosen = ppo_tasks.options(
        base,
        tmp_path / "run",
        prompts,
        eval_prompts=[str(prompts)],
        iterations=20,
        learning_rate=3e-2,
        kl_coef=0.0,
        max_kl=0.5,
        eval_every=1,
    )
    train_ppo(chosen)
    kl = metric(tmp_path / "run", "eval_kl")
    assert max(kl) < 20 and kl[max(kl)] > 0.5
    assert all(value <= 0.5 for step, value in kl.items() if step < max(kl))
    kept = torch.load(tmp_path / "run" / "checkpoints" / "kept.pt", weights_only=True)
    saved = load_file(tmp_path / "run" / "policy" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in kept.items())


def test_p23_a_score_that_is_no_number_leaves_no_policy(base: Path, prompts: Path, tmp_path: Path) -> None:
    broken = {"function": f"{ppo_tasks.__name__}:broken"}
    with pytest.raises(ScoringError, match="was scored nan"):
        train_ppo(ppo_tasks.options(base, tmp_path / "run", prompts, reward=broken))
    assert not (tmp_path / "run" / "policy").exists()


def test_what_cannot_work_claims_no_folder(base: Path, prompts: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], problem: str, **more: Any) -> None:
        with pytest.raises(error, match=problem):
            train_ppo(ppo_tasks.options(base, tmp_path / "run", prompts, **more))
        assert not (tmp_path / "run").exists()

    refused(OptionsError, "do not fall into 3 equal parts", num_minibatches=3)
    refused(OptionsError, "max_kl: needs eval_prompts", max_kl=1.0)
    refused(OptionsError, "has at most max_prompt_tokens: 2 tokens", max_prompt_tokens=2)
    refused(OptionsError, "max_new_tokens: prompts of up to", max_new_tokens=600)
    refused(OptionsError, "base: cannot load", base=str(tmp_path / "nowhere"))
    refused(OptionsError, "reward: name one of", reward={})
    refused(DataError, "no such file", eval_prompts=[str(tmp_path / "nothing.jsonl")])
    (tmp_path / "bad.jsonl").write_text('{"prompt": []}\n', encoding="utf-8")
    refused(DataError, "bad.jsonl:1", prompts=[str(tmp_path / "bad.jsonl")])


def test_batches_of_prompts_go_through_all_of_them_without_a_seam() -> None:
    taken = [place for iteration in range(7) for place in batch_of_prompts(5, iteration, 3, seed=1)]
    for epoch in range(4):
        assert sorted(taken[5 * epoch : 5 * epoch + 5]) == list(range(5))
    assert taken[:5] != taken[5:10]
    assert sorted(batch_of_prompts(2, 0, 6, seed=0)) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("name", ["ppo-tiny", "ppo-capitalised", "ppo-instructgpt", "ppo-tldr"])
def test_the_configurations_are_valid(name: str) -> None:
    chosen = load_options(PpoOptions, CONFIGS / f"{name}.yaml")
    assert chosen.global_batch_size % chosen.num_minibatches == 0
    assert num_iterations(1000, chosen) == chosen.iterations


def test_epochs_say_how_many_batches(base: Path, tmp_path: Path) -> None:
    chosen = ppo_tasks.options(base, tmp_path, tmp_path, iterations=None, epochs=2.0, global_batch_size=8)
    assert num_iterations(100, chosen) == 25
