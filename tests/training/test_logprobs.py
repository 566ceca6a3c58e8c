"""Log-probabilities of completion tokens against the plain definition, however rows are padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fakes.models import Family, build_tiny_causal_lm
from training.logprobs import completion_logits, completion_logprobs, token_entropies, token_logprobs
from training.policies import Policy, load_policy


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    family: Family = request.param
    return load_policy(str(build_tiny_causal_lm(tmp_path_factory.mktemp(family), family=family)), tuning="frozen")


def by_definition(model: Any, ids: list[int], temperature: float) -> Tensor:
    """log p(token t | tokens before) of one sequence, for t from 1 on."""
    logits = model(torch.tensor([ids])).logits[0].float() / temperature
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(policy: Policy, side: str, temperature: float) -> None:
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 300, (length,), generator=rng).tolist() for length in (9, 4, 13)]
    width = max(map(len, rows))
    ids = torch.full((3, width), 7)
    attention = torch.zeros(3, width, dtype=torch.long)
    counted = torch.zeros(3, width, dtype=torch.bool)
    places = []
    for number, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[number, start : start + len(row)] = torch.tensor(row)
        attention[number, start : start + len(row)] = 1
        counted[number, start + 2 : start + len(row)] = True
        places.append(start)
    found = completion_logprobs(policy.model, ids, attention, counted, temperature=temperature)
    assert found.shape == ids.shape
    assert not found[~counted].any()
    for number, (row, start) in enumerate(zip(rows, places, strict=True)):
        expected = by_definition(policy.model, row, temperature)[1:]
        assert torch.allclose(found[number, start + 2 : start + len(row)], expected, atol=1e-5)


@torch.no_grad()
def test_only_tokens_that_count_go_through_the_head(policy: Policy) -> None:
    ids = torch.arange(10, 20)[None]
    counted = torch.zeros(1, 10, dtype=torch.bool)
    counted[0, 6:] = True
    logits = completion_logits(policy.model, ids, None, counted)
    assert logits.shape == (4, policy.model.config.vocab_size)
    whole = policy.model(ids).logits[0, 5:9]
    assert torch.allclose(logits, whole, atol=1e-5)
    assert torch.allclose(token_logprobs(logits, ids[0, 6:]), by_definition(policy.model, ids[0].tolist(), 1.0)[5:])


def test_the_gradient_goes_through(policy: Policy) -> None:
    weight = policy.model.get_input_embeddings().weight.requires_grad_()
    ids = torch.arange(10, 20)[None]
    completion_logprobs(policy.model, ids, None, ids > 14).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    weight.grad = None
    weight.requires_grad_(False)


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]])
    assert token_entropies(logits).tolist() == pytest.approx([1.3862944, 0.0])
