"""Packed rows keep conversations apart, and give the same numbers as padded ones."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.models import Family, build_tiny_causal_lm
from training.conversations import Conversation
from training.policies import Policy, load_policy
from training.rows import Layout, bins, packed, packs_exactly, padded

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    family: Family = request.param
    return load_policy(str(build_tiny_causal_lm(tmp_path_factory.mktemp(family), family=family)), tuning="frozen")


def conversations(count: int, seed: int = 0) -> list[Conversation]:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        prompt, completion = rng.randint(1, 9), rng.randint(1, 6)
        ids = [rng.randrange(5, 300) for _ in range(prompt + completion)]
        found.append(Conversation(ids, [False] * prompt + [True] * completion, prompt))
    return found


@torch.no_grad()
def test_packed_and_padded_rows_give_the_same_log_probabilities(policy: Policy) -> None:
    items = conversations(7)
    one_row, many = packed(items, CPU), padded(items, policy.pad_id, CPU)
    assert one_row.input_ids.shape == (1, sum(map(len, items)))
    assert torch.equal(one_row.tokens, many.tokens) and torch.equal(one_row.owners, many.owners)
    ours, theirs = one_row.logprobs(policy.model), many.logprobs(policy.model)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(one_row.sums(ours, 7), many.sums(theirs, 7), atol=1e-5)


def test_no_conversation_of_a_packed_row_sees_another(policy: Policy) -> None:
    """Not by its numbers, and not by its gradient."""
    items = conversations(4)
    with torch.no_grad():
        before = packed(items, CPU).logprobs(policy.model)
        changed = [*items[:1], *conversations(1, seed=9), *items[2:]]
        after = packed(changed, CPU)
        values = after.logprobs(policy.model)
    others = packed(items, CPU).owners != 1
    assert torch.allclose(before[others], values[after.owners != 1], atol=1e-6)
    embedding = policy.model.get_input_embeddings()
    seen: list[torch.Tensor] = []
    hook = embedding.register_forward_hook(lambda _, __, output: seen.append(output.requires_grad_()) or output)
    rows = packed(items, CPU)
    loss = rows.sums(rows.logprobs(policy.model), 4)[2]
    hook.remove()
    (gradient,) = torch.autograd.grad(loss, seen)
    touched = gradient[0].abs().sum(dim=1) > 0
    start = len(items[0]) + len(items[1])
    assert touched[start : start + len(items[2]) - 1].all()
    assert not touched[:start].any() and not touched[start + len(items[2]) :].any()


def test_the_order_and_company_of_a_conversation_do_not_matter(policy: Policy) -> None:
    items = conversations(5)
    with torch.no_grad():
        sums = packed(items, CPU).sums(packed(items, CPU).logprobs(policy.model), 5)
        turned = packed(items[::-1], CPU)
        assert torch.allclose(turned.sums(turned.logprobs(policy.model), 5), sums.flip(0), atol=1e-5)


def test_whether_a_model_can_be_packed_is_found_out(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    assert packs_exactly(policy.model, len(policy.tokenizer))
    assert torch.equal(torch.get_rng_state(), state)
    forward = policy.model.forward

    def blind(**arguments: object) -> object:
        """As a model that takes positions for mere numbers."""
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])  # type: ignore[call-overload]
        return forward(**arguments)

    monkeypatch.setattr(policy.model, "forward", blind)
    assert not packs_exactly(policy.model, len(policy.tokenizer))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_bins_hold_everything_once_and_are_not_overfull(lengths: list[int], size: int) -> None:
    found = bins(lengths, size)
    assert sorted(i for one in found for i in one) == list(range(len(lengths)))
    for one in found:
        assert len(one) == 1 or sum(lengths[i] for i in one) <= size
    # First-fit leaves at most one bin that is half empty.
    assert sum(sum(lengths[i] for i in one) <= size // 2 for one in found) <= 1


def test_a_layout_splits_by_what_its_rows_cost() -> None:
    lengths = [10, 2, 2, 2]
    assert Layout(12, 0, packs=True).split(lengths) == [[0, 1], [2, 3]]
    assert Layout(12, 0, packs=False).split(lengths) == [[0], [1, 2, 3]]
