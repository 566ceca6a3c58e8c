import math

import pytest
import torch

from proxy.upstreams.local_requests import SamplingParams
from proxy.upstreams.local_sampling import NonFiniteLogitsError, Sampler, choose, token_logprobs

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -30.0]])


def draws(params: SamplingParams, count: int = 4000, logits: torch.Tensor = LOGITS) -> torch.Tensor:
    """Share of each token among `count` independent candidates."""
    samplers = [Sampler(params, seed) for seed in range(count)]
    tokens = torch.tensor([choice.token_id for choice in choose(logits.expand(count, -1), samplers)])
    return torch.bincount(tokens, minlength=logits.shape[1]) / count


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draws(SamplingParams(temperature=0.0), 10)[0] == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_shares_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    expected = torch.softmax(LOGITS[0] / temperature, dim=-1)
    # Four standard deviations of a share over 4000 draws.
    assert torch.allclose(draws(SamplingParams(temperature=temperature)), expected, atol=4 * 0.5 / math.sqrt(4000))


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])
    shares = draws(SamplingParams(), logits=logits)
    assert shares[1] == shares[3] == 0


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.64, 1), (0.65, 2), (0.9, 3), (0.999, 4)])
def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p: float, kept: int) -> None:
    # The shares are 0.644, 0.237, 0.087, 0.032 and next to nothing.
    shares = draws(SamplingParams(top_p=top_p))
    assert int((shares > 0).sum()) == kept


def test_a_wide_nucleus_is_found_beyond_the_first_look() -> None:
    shares = draws(SamplingParams(top_p=0.5), 20_000, torch.zeros(1, 1000))
    assert int((shares > 0).sum()) == 500


def test_the_same_seed_draws_the_same_tokens_whoever_else_is_drawn() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 50)
    alone = [Sampler(SamplingParams(), 7) for _ in range(1)]
    first = [choose(logits[:1], alone)[0].token_id for _ in range(20)]
    together = [Sampler(SamplingParams(), 7), Sampler(SamplingParams(temperature=0), 1), Sampler(SamplingParams(), 2)]
    assert [choose(logits, together)[0].token_id for _ in range(20)] == first


def test_logit_bias_forces_and_forbids() -> None:
    assert draws(SamplingParams(logit_bias={4: 100.0}), 50)[4] == 1
    assert draws(SamplingParams(logit_bias={0: -100.0}), 200)[0] == 0


def test_penalties_count_only_what_was_generated() -> None:
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=1.5, frequency_penalty=0.4), 0)
    # 2, 1, 0 → token 0; then 0.1, 1, 0 → token 1; then 0.1, -0.9, 0 → token 0; then -0.3, -0.9, 0 → token 2.
    assert [choose(LOGITS, [sampler])[0].token_id for _ in range(4)] == [0, 1, 0, 2]


def test_logprobs_are_of_the_raw_distribution() -> None:
    params = SamplingParams(temperature=0.3, logit_bias={3: 100.0}, top_logprobs=2)
    logprob = choose(LOGITS, [Sampler(params, 0)])[0].logprob
    expected = torch.log_softmax(LOGITS[0], dim=-1)
    assert logprob is not None
    assert logprob.logprob == pytest.approx(expected[3].item())
    assert [token for token, _ in logprob.top] == [0, 1]
    assert [value for _, value in logprob.top] == pytest.approx(expected[:2].tolist())


def test_given_tokens_are_scored_row_by_row() -> None:
    scored = token_logprobs(LOGITS.expand(2, -1), [0, 3], 0)
    assert [token.logprob for token in scored] == pytest.approx(torch.log_softmax(LOGITS[0], -1)[[0, 3]].tolist())
    assert scored[0].top == ()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_are_an_error_and_no_token(value: float) -> None:
    with pytest.raises(NonFiniteLogitsError):
        choose(torch.tensor([[0.0, value, 1.0]]), [Sampler(SamplingParams(), 0)])
