"""PPO runs from start to end: they learn, stop, resume, and leave a policy that others can load."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pkgutil
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from feedback.jsonl import DataError
from reward.errors import ScoringError
from tests.fakes.models import build_tiny_causal_lm, build_tiny_reward_model
from tests.training import policy_tasks, ppo_tasks, tasks
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


PLACES = {
    "in the middle of an update": ("training.ppo_learner.LanguageLearner.step", 19, 4),
    "in the rollout after a checkpoint": ("training.rollouts.Collector.freeze", 5, 4),
    "as a checkpoint is written": ("torch.save", 6, 2),
    "as what was good enough is kept": ("torch.save", 5, 2),
    "before the policy is written": ("training.ppo_parts.PpoParts.save_value", 1, 6),
}
"""Where a run is killed: a function, which of its calls is the last thing the process does, and the iterations that are
safe then."""


def killed_at(place: str, config: str) -> None:
    """In a process of its own: as the command does, until the kill."""
    torch.set_num_threads(1)
    name, last, _ = PLACES[place]
    owner, attribute = name.rsplit(".", 1)
    found = pkgutil.resolve_name(owner)
    whole, calls = getattr(found, attribute), itertools.count(1)

    def until(*arguments: Any, **more: Any) -> Any:
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **more)

    setattr(found, attribute, until)
    train_ppo(load_options(PpoOptions, Path(config)))


def resumable(base: Path, output: Path, prompts: Path) -> PpoOptions:
    """Six iterations with all that has a state of its own."""
    return ppo_tasks.options(
        base,
        output,
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
        ptx=[str(write_texts(prompts.parent / "mix.jsonl"))],
    )


@pytest.fixture(scope="module")
def unbroken(base: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy_tasks.on_one_process("ppo", resumable(base, tmp_path_factory.mktemp("unbroken") / "run", prompts))


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_goes_on_exactly(
    place: str, base: Path, prompts: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    config = tasks.write_config(tmp_path / "config.yaml", resumable(base, run, prompts))  # type: ignore[arg-type]
    process = multiprocessing.get_context("forkserver").Process(target=killed_at, args=(place, str(config)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (run / "policy").exists()
    made_again: list[int] = []

    def batch(num_prompts: int, iteration: int, batch_size: int, seed: int) -> list[int]:
        made_again.append(iteration)
        return batch_of_prompts(num_prompts, iteration, batch_size, seed)

    monkeypatch.setattr("training.ppo.batch_of_prompts", batch)
    train_ppo(resumable(base, run, prompts))
    assert made_again == list(range(PLACES[place][2], 6))
    assert tasks.read_log(run) == tasks.read_log(unbroken)
    for file in ("policy", "policy-ema", "value.safetensors"):
        ours, theirs = (policy_tasks.loaded(one / file) for one in (run, unbroken))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(OptionsError, match="holds a finished run"):
        train_ppo(resumable(base, run, prompts))


SPREAD: dict[str, dict[str, Any]] = {
    "top layers": {"tuning": "top_layers"},
    "shards of adapters": {"tuning": "lora", "sharding": "fsdp2"},
    "shards of everything": {"tuning": "full", "sharding": "fsdp2", "gradient_checkpointing": True},
}


@pytest.mark.parametrize("kind", SPREAD)
def test_two_processes_give_what_one_does(kind: str, base: Path, prompts: Path, tmp_path: Path) -> None:
    """P11, P19: other rows on each, the same advantages and the same weights."""

    def options(name: str, **more: Any) -> PpoOptions:
        chosen = {
            "eval_prompts": [str(prompts)],
            "num_minibatches": 2,
            "micro_batch_tokens": 40,
            "learning_rate": 3e-3,
            "ptx": [str(write_texts(tmp_path / "mix.jsonl"))],
            "ema_decay": 0.5,
        }
        return ppo_tasks.options(base, tmp_path / name, prompts, **{**chosen, **SPREAD[kind], **more})

    train_ppo(options("one", sharding="none"))
    assert_same_runs(tmp_path / "one", policy_tasks.on_two_processes("ppo", options("two")))


def assert_same_runs(one: Path, two: Path) -> None:
    lines = list(zip(tasks.read_log(one), tasks.read_log(two), strict=True))
    assert lines
    for ours, theirs in lines:
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    for file in ("policy", "policy-ema", "value.safetensors"):
        weights, others = (policy_tasks.loaded(run / file) for run in (one, two))
        assert weights.keys() == others.keys()
        assert all(torch.allclose(weights[name], others[name], atol=2e-4) for name in weights)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_processes_without_a_part_of_their_own_change_nothing(tuning: str, base: Path, tmp_path: Path) -> None:
    """A row a minibatch, one held-out prompt and one example of language data, for two processes with a shard each."""
    asked = ppo_tasks.write_prompts(tmp_path / "prompts.jsonl", 3)
    held_out = ppo_tasks.write_prompts(tmp_path / "held-out.jsonl", 1)

    def options(name: str, **more: Any) -> PpoOptions:
        rows = 1 if tuning == "full" else 2
        chosen = {
            "tuning": tuning,
            "value_base": str(build_tiny_reward_model(tmp_path / f"reward-{name}")),
            "eval_prompts": [str(held_out)],
            "global_batch_size": rows,
            "num_minibatches": rows,
            "ptx": [str(write_texts(tmp_path / "mix.jsonl"))],
            "ema_decay": 0.5,
            "kl_target": 1.0,
            "save_every": 1,
        }
        return ppo_tasks.options(base, tmp_path / name, asked, **chosen, **more)

    train_ppo(options("one"))
    assert_same_runs(tmp_path / "one", policy_tasks.on_two_processes("ppo", options("two", sharding="fsdp2")))


def test_a_value_model_as_large_as_the_policy_is_sharded_too(prompts: Path, tmp_path: Path) -> None:
    """And a run in shards goes on in shards."""
    reward_model = build_tiny_reward_model(tmp_path / "reward")
    start = build_tiny_causal_lm(tmp_path / "policy")

    def options(name: str, **more: Any) -> PpoOptions:
        chosen = {"tuning": "lora", "value_base": str(reward_model), "save_every": 1, "eval_prompts": [str(prompts)]}
        return ppo_tasks.options(start, tmp_path / name, prompts, **{**chosen, **more})

    train_ppo(options("one"))
    two = policy_tasks.on_two_processes("ppo", options("two", sharding="fsdp2"))
    first, last = (two / "checkpoints" / f"step-{step:07d}" for step in (2, 3))
    shutil.rmtree(last)
    shutil.rmtree(two / "policy")
    before = (first / "state.pt").stat().st_mtime_ns
    policy_tasks.on_two_processes("ppo", options("two", sharding="fsdp2"))
    assert last.is_dir() and (first / "state.pt").stat().st_mtime_ns == before, "only the third was made again"
    for file in ("policy", "value.safetensors"):
        weights, others = (policy_tasks.loaded(run / file) for run in (tmp_path / "one", two))
        assert all(torch.allclose(weights[name], others[name], atol=2e-4) for name in weights)
    assert metric(two, "score") == pytest.approx(metric(tmp_path / "one", "score"), rel=1e-3)


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
        ema_decay=0.0,  # an average over one iteration is that iteration's weights
    )
    train_ppo(chosen)
    kl = metric(tmp_path / "run", "eval_kl")
    assert max(kl) < 20 and kl[max(kl)] > 0.5
    assert all(value <= 0.5 for step, value in kl.items() if step < max(kl))
    kept = torch.load(tmp_path / "run" / "checkpoints" / "kept.pt", weights_only=True)
    saved = load_file(tmp_path / "run" / "policy" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in kept.items())
    averaged = load_file(tmp_path / "run" / "policy-ema" / "model.safetensors")
    assert all(torch.equal(averaged[name], value) for name, value in kept.items())


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
    refused(OptionsError, "sharding: fsdp2 goes with tuning: lora or full", sharding="fsdp2")
    refused(OptionsError, "sharding: fsdp2 .* use torchrun", sharding="fsdp2", tuning="lora")
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
