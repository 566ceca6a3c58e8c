"""Packed rows keep conversations apart, and give the same numbers as padded ones."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.models import Family, build_tiny_causal_lm
from training.block_attention import UnsupportedAttentionError, block_attention
from training.conversations import Conversation
from training.policies import Policy, load_policy
from training.rows import Layout, bins, choose_layout, pack_rows, packed, padded

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    family: Family = request.param
    found = load_policy(str(build_tiny_causal_lm(tmp_path_factory.mktemp(family), family=family)), tuning="frozen")
    assert choose_layout(found, "auto", 100).packs
    return found


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
    assert pack_rows(policy.model, len(policy.tokenizer))
    assert torch.equal(torch.get_rng_state(), state)
    forward = policy.model.forward

    def deaf(**arguments: object) -> object:
        """As a model that does not pass on what it does not know."""
        arguments.pop("block_lengths", None)
        return forward(**arguments)

    monkeypatch.setattr(policy.model, "forward", deaf)
    assert not pack_rows(policy.model, len(policy.tokenizer))
    assert not choose_layout(policy, "off", 100).packs


@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("lengths", [(5,), (2, 7, 1, 4)])
def test_attention_in_blocks_is_attention_under_a_mask(lengths: tuple[int, ...], window: int | None) -> None:
    rng = torch.Generator().manual_seed(0)
    total = sum(lengths)
    query = torch.randn(1, 4, total, 8, generator=rng)
    key, value = torch.randn(2, 1, 2, total, 8, generator=rng)
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    behind = torch.arange(total)[:, None] - torch.arange(total)[None]
    seen = (owner[:, None] == owner[None]) & (behind >= 0) & (behind < (window or total))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=seen, scale=0.3
    )
    found, _ = block_attention(
        torch.nn.Module(), query, key, value, None, block_lengths=lengths, scaling=0.3, sliding_window=window
    )
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-6)


def test_attention_that_is_another_sum_is_refused() -> None:
    states = torch.randn(1, 2, 3, 4)
    with pytest.raises(UnsupportedAttentionError, match="softcap"):
        block_attention(torch.nn.Module(), states, states, states, None, block_lengths=(3,), softcap=30.0)


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
