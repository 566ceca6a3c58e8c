"""A policy on held-out prompts: its score, and how far it is from the reference, by the whole vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from feedback.jsonl import replacing
from training.kl import entropy_of, exact_kl, k1
from training.logprobs import token_logprobs
from training.rollouts import Collector, EncodedPrompt, Sampled, gathered
from training.sequences import TokenSequence, in_slots

STREAM = "evaluation"
"""The chance of every evaluation: the same draws each time, so that two differ by the policy only."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Means over held-out completions. KL in nats a completion."""

    score: float
    kl: float
    """Exact: over the whole vocabulary at each token, summed over the completion."""
    kl_k1: float
    """Of the sampled tokens only."""
    entropy: float
    """Nats a token."""
    length: float
    """Tokens."""
    ended_share: float
    """Share of the completions that came to their end token."""
    distinct: float
    """Share of a completion's tokens that are different ones."""


@dataclass(frozen=True, slots=True)
class _One:
    score: float
    kl: float
    kl_k1: float
    entropy: float
    length: int
    ended: bool
    distinct: float
    prompt: str
    text: str


def evaluate(collector: Collector, prompts: Sequence[EncodedPrompt]) -> tuple[HeldOut, list[dict[str, object]]]:
    """Samples, scores and measures; the second is a table of the completions, for people."""
    samples = collector.sample(prompts, STREAM)
    found: list[_One] = []
    measured = _measured(collector, [sample.sequence for sample in samples])
    for sample, (kl, first, entropy) in zip(samples, measured, strict=True):
        ids = sample.sequence.completion
        found.append(
            _One(
                sample.score,
                kl,
                first,
                entropy,
                len(ids),
                sample.ended,
                len(set(ids)) / len(ids),
                _words(sample),
                sample.text,
            )
        )
    together: list[_One] = gathered(collector.accelerator, found, len(prompts))
    table: list[dict[str, object]] = [asdict(one) for one in together]
    return _means(together), table


def write_samples(folder: Path, step: int, table: Sequence[dict[str, object]]) -> None:
    """`samples/step-NNNNNN.jsonl`: what the policy said at this step, whole or not at all."""
    with replacing(folder / "samples" / f"step-{step:06d}.jsonl") as partial:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table), encoding="utf-8")


@torch.no_grad()
def _measured(collector: Collector, sequences: Sequence[TokenSequence]) -> list[tuple[float, float, float]]:
    """Exact KL, k1 and entropy (all summed over the completion; entropy a token) of each."""
    actors = collector.actors
    results: list[tuple[float, float, float]] = [(0.0, 0.0, 0.0)] * len(sequences)
    for part, there in collector.micro_batches(sequences):
        batch = actors.collate(there)
        below = None
        if actors.hydra is not None:
            below = actors.hydra.below(batch.input_ids, batch.attention_mask, batch.position_ids)
        with actors.precision():
            policy = actors.policy_logits(batch, below)
            reference, _ = actors.reference_logits(batch, below)
        tokens = batch.input_ids[batch.completion_mask]
        first = k1(token_logprobs(policy, tokens), token_logprobs(reference, tokens))
        log_policy = policy.log_softmax(dim=-1)
        facts = (exact_kl(log_policy, reference.log_softmax(dim=-1)), first, entropy_of(log_policy))
        kl, sampled, entropy = (in_slots(fact, batch.slots).cpu().double().sum(dim=1).tolist() for fact in facts)
        for row, place in enumerate(part):
            length = len(sequences[place].completion)
            results[place] = (kl[row], sampled[row], entropy[row] / length)
    return results


def _means(found: Sequence[_One]) -> HeldOut:
    count = len(found)
    return HeldOut(
        score=sum(one.score for one in found) / count,
        kl=sum(one.kl for one in found) / count,
        kl_k1=sum(one.kl_k1 for one in found) / count,
        entropy=sum(one.entropy for one in found) / count,
        length=sum(one.length for one in found) / count,
        ended_share=sum(one.ended for one in found) / count,
        distinct=sum(one.distinct for one in found) / count,
    )


def _words(sample: Sampled) -> str:
    last = sample.prompt.messages[-1].get("content")
    return last if isinstance(last, str) else json.dumps(last, ensure_ascii=False)
