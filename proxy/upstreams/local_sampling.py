"""From logits to the next token of each candidate. Imports torch: import this only where a model is loaded.

Each candidate draws with its own generator, one number a token, so that its text depends on its seed alone and
not on who shares the batch. The distribution is the model's own at the asked temperature: nothing of the
checkpoint's generation settings takes part. Shapes: B candidates, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from proxy.upstreams.local_requests import SamplingParams
from proxy.upstreams.local_text import TokenLogprob


class NonFiniteLogitsError(ArithmeticError):
    """The model gave NaN or infinite logits: broken weights, or a dtype too narrow for them."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The token drawn for one candidate, with its log-probabilities where they were asked for."""

    token_id: int
    logprob: TokenLogprob | None


class Sampler:
    """What one candidate's draws depend on besides the logits: its parameters, generator and past tokens."""

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self.params = params
        # On the CPU whatever the model's device: the same seed draws the same numbers everywhere.
        self._generator = torch.Generator().manual_seed(seed)
        self._counts: Counter[int] = Counter()

    def draw(self) -> float:
        """A number in [0, 1), one a sampled token."""
        return torch.rand((), generator=self._generator, dtype=torch.float64).item()

    def note(self, token_id: int) -> None:
        """Remembers a chosen token, for the penalties."""
        if self._penalises:
            self._counts[token_id] += 1

    def adjustments(self) -> dict[int, float]:
        """What to add to which logits: the bias, less the penalties on tokens generated so far."""
        params = self.params
        adjustments = dict(params.logit_bias or {})
        for token_id, count in self._counts.items():
            penalty = params.presence_penalty + params.frequency_penalty * count
            adjustments[token_id] = adjustments.get(token_id, 0.0) - penalty
        return adjustments

    @property
    def _penalises(self) -> bool:
        return bool(self.params.presence_penalty or self.params.frequency_penalty)


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """The next token of each candidate from its row of `logits` (B, V). Raises `NonFiniteLogitsError`."""
    assert logits.shape[0] == len(samplers)
    raw = logits.float()
    scores = _adjusted(raw, samplers)
    best, chosen = scores.max(dim=-1)  # (B,)
    if not bool(torch.isfinite(best).all()):
        raise NonFiniteLogitsError("the model's output is not finite; try --dtype float32")
    sampled = [row for row, sampler in enumerate(samplers) if not sampler.params.greedy]
    if sampled:
        rows = scores if len(sampled) == len(samplers) else scores[sampled]
        chosen[sampled] = _draw(rows, [samplers[row] for row in sampled])
    token_ids: list[int] = chosen.tolist()
    for sampler, token_id in zip(samplers, token_ids, strict=True):
        sampler.note(token_id)
    logprobs = _logprobs(raw, token_ids, [sampler.params.top_logprobs for sampler in samplers])
    return [Choice(token_id, logprobs.get(row)) for row, token_id in enumerate(token_ids)]


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Log-probabilities of given tokens, one a row of `logits` (B, V): the tokens of an echoed prompt."""
    found = _logprobs(logits.float(), token_ids, [num_top] * len(token_ids))
    return [found[row] for row in range(len(token_ids))]


def _adjusted(raw: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    adjusted = raw
    for row, sampler in enumerate(samplers):
        adjustments = sampler.adjustments()
        if not adjustments:
            continue
        if adjusted is raw:
            adjusted = raw.clone()  # log-probabilities are reported from the raw logits
        ids = torch.tensor(list(adjustments), device=raw.device)
        adjusted[row, ids] += torch.tensor(list(adjustments.values()), device=raw.device)
    return adjusted


def _draw(scores: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """One token a row by inverting the cumulative distribution at the candidate's own number. (B,)"""
    temperatures = torch.tensor([[sampler.params.temperature] for sampler in samplers], device=scores.device)
    probabilities = torch.softmax(scores / temperatures, dim=-1)
    for row, sampler in enumerate(samplers):
        if sampler.params.top_p < 1:
            _keep_nucleus(probabilities[row], sampler.params.top_p)
    # Summed over a whole vocabulary, single precision is off by more than a rare token's share. MPS has no other.
    wide = torch.float32 if scores.device.type == "mps" else torch.float64
    cumulative = probabilities.cumsum(dim=-1, dtype=wide)
    totals = cumulative[:, -1:]
    numbers = torch.tensor([[sampler.draw()] for sampler in samplers], dtype=wide, device=scores.device)
    # The first token whose cumulative share passes the number: one of probability 0 never does.
    drawn = torch.searchsorted(cumulative, numbers * totals, right=True).squeeze(-1)
    # Rounding may lift number × total up to the total itself, behind every token.
    return torch.where(drawn < scores.shape[-1], drawn, probabilities.argmax(dim=-1))


def _keep_nucleus(probabilities: torch.Tensor, top_p: float) -> None:
    """Zeroes, in place, all but the fewest likeliest tokens that together reach `top_p` (Holtzman et al. 2020). (V,)"""
    num_likeliest = 256
    while True:
        # Most nuclei are small, and sorting a whole vocabulary costs more than the rest of the draw.
        values, ids = probabilities.topk(min(num_likeliest, probabilities.numel()))
        before = values.cumsum(dim=-1) - values
        if num_likeliest >= probabilities.numel() or bool(before[-1] >= top_p):
            break
        num_likeliest *= 16
    kept = before < top_p
    nucleus = values * kept
    probabilities.zero_()
    probabilities[ids] = nucleus


def _logprobs(raw: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int | None]) -> dict[int, TokenLogprob]:
    """By row, for the rows where `num_top` is not None."""
    rows = [row for row, count in enumerate(num_top) if count is not None]
    if not rows:
        return {}
    logprobs = torch.log_softmax(raw[rows], dim=-1)
    own = logprobs.gather(1, torch.tensor([[token_ids[row]] for row in rows], device=raw.device)).squeeze(1).tolist()
    most = max(num_top[row] or 0 for row in rows)
    values, ids = (part.tolist() for part in logprobs.topk(min(most, raw.shape[-1]), dim=-1))
    return {
        row: TokenLogprob(token_ids[row], own[at], tuple(zip(ids[at], values[at], strict=True))[: num_top[row] or 0])
        for at, row in enumerate(rows)
    }
