"""Compiled layers: the same rewards, for shapes that were not there when they were compiled, or a refusal on load."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import reward.model
from feedback.records import Message, Messages
from reward.compiling import compile_blocks
from reward.errors import ModelLoadError
from reward.model import RewardModel, load_reward_model
from tests.reward.conftest import TinyReward


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def rewards(model: RewardModel, words: int, *answers: str) -> list[float]:
    prompt: list[Message] = [{"role": "user", "content": "one two three " * words}]
    completions: list[Messages] = [[{"role": "assistant", "content": answer}] for answer in answers]
    items = [model.renderer.render(prompt, completion) for completion in completions]
    return model.raw_rewards(model.shared(items, remember=True))


# The compiler behind it takes half a minute; what is compiled, and how often, does not depend on it.
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_shapes_that_come_later_are_compiled_already(
    family: str, tiny_reward: TinyReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward.model, "compile_blocks", partial(compile_blocks, backend="eager"))
    source = str(tiny_reward(family))
    plain, compiled = load_reward_model(source, device="cpu"), load_reward_model(source, device="cpu", compiled=True)
    assert (plain.sharing is None) == (compiled.sharing is None) == (family == "bert")
    num_graphs = counters["stats"]["unique_graphs"]
    assert num_graphs > 0
    for words, answers in [(1, ["Paris."]), (30, ["Paris.", "I do not know."]), (9, ["a b", "c", "d e f", "g", "h"])]:
        for _ in range(2):
            expected = rewards(plain, words, *answers)
            assert rewards(compiled, words, *answers) == pytest.approx(expected, abs=1e-4)
    assert counters["stats"]["unique_graphs"] == num_graphs


def test_where_nothing_can_be_compiled_loading_says_so(tiny_reward: TinyReward) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    model = load_reward_model(str(tiny_reward("llama")), device="cpu")
    with pytest.raises(ModelLoadError, match=r"tiny cannot be compiled here: .*no compiler here; set reward"):
        compile_blocks(model, "tiny", backend=broken)
