"""Best-of-N distillation from prompts to a policy: what is learnt, what a kill costs, what may change in between."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from feedback.records import Completions, Message, Messages
from reward.rendering import content_text
from tests.fakes.models import build_tiny_causal_lm, build_tiny_reward_model
from tests.training import policy_tasks
from training import distill as method
from training.conversations import encode_conversation
from training.distill import DistillOptions, distill
from training.options import OptionsError
from training.policies import load_policy
from training.sampling import Drawn, GenerationError, Outcome, Sampling, Task, draw_all

ANSWERS = ("bad", "the good fox", "the good good dog")
BEST = ANSWERS[-1]


class Upstream:
    """Draws the same answers for every prompt; `before` may fail."""

    def __init__(self, before: Callable[[str], None] = lambda asked: None) -> None:
        self.asked: list[str] = []
        self._before = before

    async def generate(self, prompt: Messages, count: int, seed: int | None) -> list[Drawn]:
        self._before(content_text(prompt[-1]))
        self.asked.append(content_text(prompt[-1]))
        return [Drawn([{"role": "assistant", "content": ANSWERS[i % 3]}], "stop") for i in range(count)]

    def draw(self, begin: Callable[[str], Sequence[Task]], keep: Callable[[Task, Sequence[Drawn]], None]) -> Outcome:
        sampling = Sampling(count=3)
        return asyncio.run(draw_all(begin("m"), self.generate, sampling, keep, at_once=1, max_failures_in_a_row=2))


class Judge:
    """Likes the word good."""

    def __init__(self) -> None:
        self.num_scored = 0

    def score(self, parts: Iterable[Sequence[Completions]]) -> Iterator[list[dict[str, Any]]]:
        for records in parts:
            self.num_scored += len(records)
            yield [self._record(one) for one in records]

    def _record(self, one: Completions) -> dict[str, Any]:
        rewards = [float(content_text(completion[-1]).count("good")) for completion in one.completions]
        return {"rewards": rewards, "percentiles": [50.0 * one for one in rewards], "reward_model": "words"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Tiny models are much slower on several, the more so when the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_causal_lm(tmp_path_factory.mktemp("base"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"one two {i}"}) + "\n" for i in range(6)), encoding="utf-8")
    return path


def options(base: Path, prompts: Path, **more: Any) -> DistillOptions:
    chosen: dict[str, Any] = {
        "base": str(base),
        "output": str(prompts.parent / "run"),
        "prompts": [str(prompts)],
        "samples_per_prompt": 3,
        "device": "cpu",
        "mixed_precision": "no",
        "max_length": 96,
        "tuning": "full",
        "learning_rate": 1e-2,
        "epochs": 4,
        "global_batch_size": 3,
        **more,
    }
    return DistillOptions.model_validate(chosen)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def surprise(policy_path: Path, answer: str) -> float:
    """Mean negative log-probability of an answer's tokens."""
    policy = load_policy(str(policy_path), tuning="frozen")
    prompt: list[Message] = [{"role": "user", "content": "one two 9"}]
    said: list[Message] = [{"role": "assistant", "content": answer}]
    encoded = encode_conversation(policy, prompt, said)
    ids = torch.tensor([encoded.ids])
    logits = policy.model(ids).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    return float(losses[torch.tensor(encoded.completion_mask[1:])].mean())


def test_the_policy_learns_what_the_best_of_its_answers_was(base: Path, prompts: Path) -> None:
    upstream, judge = Upstream(), Judge()
    folder = distill(options(base, prompts), upstream.draw, judge.score)
    run = prompts.parent / "run"
    assert folder == run / "policy"
    assert [one["completion"][0]["content"] for one in lines(run / "winners.jsonl")] == [BEST] * 6
    assert [one["rewards"] for one in lines(run / "scored.jsonl")] == [[0.0, 1.0, 2.0]] * 6
    selection = json.loads((run / "selection.json").read_text(encoding="utf-8"))
    assert (selection["winners"], selection["outdone"]) == (6, 12)
    assert (selection["mean_reward"], selection["winners_mean_reward"]) == (1.0, 2.0)
    assert surprise(folder, BEST) < surprise(base, BEST) / 2
    with pytest.raises(OptionsError, match="holds a finished run"):
        distill(options(base, prompts), upstream.draw, judge.score)


def test_a_killed_run_goes_on_at_every_stage(base: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, judge = options(base, prompts), Judge()
    run = prompts.parent / "run"

    def kill(*_: object) -> Any:
        raise KeyboardInterrupt

    def at_the_fourth(asked: str) -> None:
        if asked == "one two 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(chosen, Upstream(at_the_fourth).draw, judge.score)
    assert not (run / "samples.jsonl").exists()
    upstream = Upstream()
    with pytest.raises(KeyboardInterrupt):
        distill(chosen, upstream.draw, kill)
    assert upstream.asked == ["one two 3", "one two 4", "one two 5"]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(method, "train_sft", kill)
        distill(chosen, upstream.draw, judge.score)
    assert (len(upstream.asked), judge.num_scored) == (3, 6)
    # Killed between the end of training and the last move.
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", kill)
        patched.setattr(method, "train_sft", lambda _: run / "sft" / "policy")
        distill(chosen, upstream.draw, judge.score)
    assert distill(chosen, kill, kill) == run / "policy"
    assert (len(upstream.asked), judge.num_scored) == (3, 6)


def test_rules_may_change_until_something_was_chosen(base: Path, prompts: Path) -> None:
    upstream, judge = Upstream(), Judge()
    with pytest.raises(OptionsError, match=r"min_reward: no completion is good enough .*too_low 6"):
        distill(options(base, prompts, min_reward=5, fit=False), upstream.draw, judge.score)
    with pytest.raises(OptionsError, match="another samples_per_prompt"):
        distill(options(base, prompts, samples_per_prompt=2, fit=False), upstream.draw, judge.score)
    chosen = options(base, prompts, min_reward="p90", top_share=0.5, fit=False)
    winners = distill(chosen, upstream.draw, judge.score)
    assert winners == prompts.parent / "run" / "winners.jsonl"
    assert len(lines(winners)) == 3
    assert (len(upstream.asked), judge.num_scored) == (6, 6), "what was drawn and scored was good for other rules too"
    with pytest.raises(OptionsError, match="another min_reward"):
        distill(options(base, prompts, min_reward=5, fit=False), upstream.draw, judge.score)
    fitting = chosen.model_copy(update={"fit": True})
    assert distill(fitting, upstream.draw, judge.score) == prompts.parent / "run" / "policy"


def test_another_runs_folder_is_left_as_it_is(base: Path, prompts: Path) -> None:
    theirs = prompts.parent / "run" / "options.json"
    theirs.parent.mkdir()
    theirs.write_text('{"base": "another"}', encoding="utf-8")
    with pytest.raises(OptionsError, match="holds a run with another"):
        distill(options(base, prompts), Upstream().draw, Judge().score)
    assert theirs.read_text(encoding="utf-8") == '{"base": "another"}'


def test_demonstrations_are_learnt_beside_the_winners(base: Path, prompts: Path) -> None:
    more = prompts.parent / "more.jsonl"
    more.write_text('{"prompt": "p", "completion": "c"}\n', encoding="utf-8")
    chosen = options(base, prompts, train=[str(more)], learning_rate=3e-3)
    fine_tuning = chosen.fine_tuning(Path("run"))
    assert fine_tuning.train == ["run/winners.jsonl", str(more)]
    assert (fine_tuning.output, fine_tuning.base, fine_tuning.learning_rate) == ("run/sft", str(base), 3e-3)


def test_prompts_that_fail_stop_it_unless_allowed(base: Path, prompts: Path) -> None:
    def fail(asked: str) -> None:
        if asked == "one two 1":
            raise GenerationError("nothing came")

    failing = Upstream(fail)
    with pytest.raises(OptionsError, match=r"1 of 6 failed, the first at .*prompts\.jsonl:2: nothing came"):
        distill(options(base, prompts, fit=False), failing.draw, Judge().score)
    prompts_allowed = options(base, prompts, fit=False, max_failed_prompts=1, output=str(prompts.parent / "other"))
    assert len(lines(distill(prompts_allowed, failing.draw, Judge().score))) == 5


def test_two_processes_learn_the_winners_that_one_chose(base: Path, prompts: Path, tmp_path: Path) -> None:
    judge = build_tiny_reward_model(tmp_path / "judge")

    def chosen(name: str) -> DistillOptions:
        own = {"output": str(tmp_path / name), "reward_model": str(judge), "max_new_tokens": 8, "keep_cut_off": True}
        return options(base, prompts, **own)

    one = policy_tasks.on_one_process("distill", chosen("one"))
    two = policy_tasks.on_two_processes("distill", chosen("two"))
    assert lines(one / "winners.jsonl") == lines(two / "winners.jsonl")
    weights, others = policy_tasks.saved_weights(one), policy_tasks.saved_weights(two)
    assert all(torch.allclose(weights[name], others[name], atol=1e-5) for name in weights)
    # A finished run is found finished by both; one that was killed before its last step does only that.
    shutil.move(two / "policy", two / "sft" / "policy")
    policy_tasks.on_two_processes("distill", chosen("two"))
    assert (two / "policy").is_dir()
