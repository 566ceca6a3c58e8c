"""PPO-ptx: language data whose loss goes into the same gradients as the reinforcement learning.

InstructGPT (arXiv 2203.02155, eq. 2): + γ · E[log π(x)] over pretraining data, gradients accumulated in the same
buffer before each step (appendix C.4: γ = 27.8, 8 examples for each episode of a minibatch).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from feedback.jsonl import Skipped, read_records
from feedback.records import Demonstration, RecordError, parse_demonstration
from reward.network import batches_by_length
from training.actors import Actors
from training.batches import epoch_order
from training.conversations import Conversation, encode_conversation, fitted
from training.distributed import in_step
from training.logprobs import completion_logprobs
from training.options import OptionsError
from training.policies import Policy


class LanguageMix:
    """Examples and their order. Each call of `accumulate` takes the next ones, the same on every process."""

    def __init__(
        self,
        examples: Sequence[Conversation],
        *,
        coefficient: float,
        examples_per_step: int,
        micro_batch_tokens: int,
        seed: int,
    ) -> None:
        self._examples = examples
        self._coefficient = coefficient
        self._examples_per_step = examples_per_step
        self._micro_batch_tokens = micro_batch_tokens
        self._seed = seed
        self.taken = 0
        """Examples so far: where a resumed run goes on."""
        self._order: tuple[int, list[int]] = (-1, [])

    def accumulate(self, accelerator: Accelerator, actors: Actors) -> float:
        """Adds γ · (mean loss a token) of the next examples to the gradients; returns that loss, of all processes."""
        examples = [self._examples[self._place(self.taken + k)] for k in range(self._examples_per_step)]
        self.taken += len(examples)
        num_tokens = sum(one.num_completion_tokens for one in examples)
        mine = examples[accelerator.process_index :: accelerator.num_processes]
        total = torch.zeros((), device=actors.device)
        parts = [
            [mine[k] for k in part] for part in batches_by_length([len(o) for o in mine], self._micro_batch_tokens)
        ]
        for part, counts in in_step(parts, examples[:1], is_sharded=actors.is_sharded):
            loss = self._loss(part, actors) * counts
            (self._coefficient * loss / num_tokens).backward()
            total += loss.detach()
        return float(accelerator.reduce(total, reduction="sum")) / num_tokens

    def _place(self, number: int) -> int:
        epoch, place = divmod(number, len(self._examples))
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self._examples), self._seed, epoch))
        return self._order[1][place]

    def _loss(self, part: Sequence[Conversation], actors: Actors) -> Any:
        width = max(map(len, part))
        device = actors.device

        def filled(rows: Iterator[list[int]]) -> torch.Tensor:
            return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)

        ids = filled(one.ids for one in part)
        attention = filled([1] * len(one) for one in part)
        counted = filled([int(kept) for kept in one.completion_mask] for one in part).bool()
        with actors.precision():
            # The whole model, trained layers and all: what `top_layers` shares belongs to the rollouts.
            return -completion_logprobs(actors.policy.model, ids, attention, counted).sum()


def read_mix(files: Sequence[str], policy: Policy, *, max_length: int, skipped: Skipped | None) -> list[Conversation]:
    """Demonstrations, whose answers count, and records of plain `text`, all of which counts. Raises `DataError`."""
    examples: list[Conversation] = []
    for record in read_records([Path(file).expanduser() for file in files], _parse, skipped):
        if isinstance(record, str):
            ids: list[int] = policy.tokenizer(record, add_special_tokens=True)["input_ids"][:max_length]
            if len(ids) > 1:
                examples.append(Conversation(ids, [False] + [True] * (len(ids) - 1), 1))
        else:
            examples += fitted(policy, [encode_conversation(policy, record.prompt, record.completion)], max_length)
    if not examples:
        raise OptionsError(f"ptx: no example in {', '.join(files)}")
    return examples


def _parse(record: Mapping[str, Any]) -> Demonstration | str:
    text = record.get("text")
    if text is None:
        return parse_demonstration(record)
    if not isinstance(text, str) or not text:
        raise RecordError("text", "must be a text that is not empty")
    return text
