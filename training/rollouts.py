"""Rollouts of PPO: prompts -> completions -> scores -> what the update needs of them.

Each process samples, scores and evaluates its share of a batch; then all of them hold all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from feedback.jsonl import Skipped, read_records
from feedback.records import Messages, RecordError, parse_prompt
from reward.errors import InputError
from reward.network import batches_by_length
from reward.rendering import content_text
from training.actors import Actors, Frozen
from training.batches import epoch_order
from training.conversations import encode_prompt
from training.decoding import decode, uniforms
from training.distributed import in_step, whole_weights
from training.options import OptionsError
from training.policies import Policy
from training.ppo_update import Rollout
from training.sequences import TokenSequence, padded

PromptFormat = Literal["chat", "text"]


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """What the policy is given to answer, or to continue."""

    messages: Messages
    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A completion and its score."""

    prompt: EncodedPrompt
    sequence: TokenSequence
    text: str
    """Without special tokens: what was scored."""
    ended: bool
    """It came to its end token."""
    score: float
    """As the reward source gave it."""
    sampled_logprobs: Sequence[float] | None
    """As the sampler saw them."""


@dataclass(frozen=True, slots=True)
class Written:
    """A completion as it was drawn."""

    ids: Sequence[int]
    """Its end token included, where it came to one. Not empty."""
    logprobs: Sequence[float] | None = None
    """Of each, as the sampler saw it; None where that is the pass of training itself."""


class Sampler(Protocol):
    """Writes completions of prompts under the policy as it is now."""

    def __call__(self, prompts: Sequence[Sequence[int]], chance: Tensor) -> list[Written]:
        """None longer than `chance` (B, C) is wide, which holds uniform numbers. Raises `UnreachableError`."""

    def weights_changed(self, iteration: int) -> None:
        """The policy has learnt, or was loaded: called by all processes before it is sampled from again.

        Raises `UnreachableError`.
        """


class ScoreTexts(Protocol):
    """Scores completions."""

    def __call__(self, prompts: Sequence[Messages], completions: Sequence[str]) -> list[float]:
        """One finite number each."""


def read_prompts(
    files: Sequence[str], policy: Policy, *, form: PromptFormat, max_tokens: int, skipped: Skipped | None
) -> tuple[list[EncodedPrompt], int]:
    """Prompts of files (any record with a `prompt`), and how many were left out as longer than `max_tokens`.

    `chat`: messages in the policy's chat template; `text`: the last message's words alone, to be continued. Raises
    `DataError`; `OptionsError` when nothing is left.
    """

    def parse(record: Mapping[str, Any]) -> EncodedPrompt:
        messages = parse_prompt(record).prompt
        try:
            ids = (
                encode_prompt(policy, messages)
                if form == "chat"
                else policy.tokenizer(content_text(messages[-1]), verbose=False)["input_ids"]
            )
        except (InputError, TypeError) as error:
            raise RecordError("prompt", str(error)) from error
        if not ids:
            raise RecordError("prompt", "has no tokens")
        return EncodedPrompt(messages, ids)

    prompts = list(read_records([Path(file).expanduser() for file in files], parse, skipped))
    kept = [prompt for prompt in prompts if len(prompt.ids) <= max_tokens]
    if not kept:
        raise OptionsError(
            f"prompts: none of {len(prompts)} in {', '.join(files)} has at most max_prompt_tokens: {max_tokens} tokens"
        )
    return kept, len(prompts) - len(kept)


def batch_of_prompts(num_prompts: int, iteration: int, batch_size: int, seed: int) -> list[int]:
    """Which prompts an iteration (from 0) takes: epoch after epoch without a seam, each in an order of its own."""
    places: list[int] = []
    for number in range(iteration * batch_size, (iteration + 1) * batch_size):
        epoch, place = divmod(number, num_prompts)
        if not places or place == 0:
            order = epoch_order(num_prompts, seed, epoch)
        places.append(order[place])
    return places


class ModelSampler:
    """Decodes with the policy's own weights, prompts of similar length together.

    Sharded weights are put together in each process meanwhile, which then writes as long as its own completions take.
    """

    def __init__(self, actors: Actors, batch_size: int) -> None:
        self._actors = actors
        self._batch_size = batch_size

    def __call__(self, prompts: Sequence[Sequence[int]], chance: Tensor) -> list[Written]:
        with whole_weights(self._actors.policy.model):
            return self._written(prompts, chance)

    def _written(self, prompts: Sequence[Sequence[int]], chance: Tensor) -> list[Written]:
        actors = self._actors
        completions: list[Written] = [Written([])] * len(prompts)
        by_length = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        for start in range(0, len(prompts), self._batch_size):
            part = by_length[start : start + self._batch_size]
            with actors.precision():
                written = decode(
                    actors.policy.model,
                    [prompts[place] for place in part],
                    chance[part],
                    temperature=actors.temperature,
                    stop_ids=actors.policy.stop_ids,
                    pad_id=actors.policy.pad_id,
                )
            for place, ids in zip(part, written, strict=True):
                completions[place] = Written(ids)
        return completions

    def weights_changed(self, iteration: int) -> None:
        """They are the policy's own."""


@dataclass(frozen=True, slots=True)
class Collector:
    """Samples and scores batches of prompts."""

    accelerator: Accelerator
    actors: Actors
    sampler: Sampler
    score: ScoreTexts
    max_new_tokens: int
    micro_batch_tokens: int
    seed: int

    def sample(self, prompts: Sequence[EncodedPrompt], stream: str) -> list[Sampled]:
        """Of this process's share of `prompts`: every n-th, in order.

        `stream` names the chance that is used: the same name gives the same completions from the same policy.
        """
        rows = range(self.accelerator.process_index, len(prompts), self.accelerator.num_processes)
        mine = [prompts[row] for row in rows]
        chance = uniforms(self.seed, stream, rows, self.max_new_tokens)
        written = self.sampler([prompt.ids for prompt in mine], chance)
        if not mine:
            return []
        stop_ids, tokenizer = self.actors.policy.stop_ids, self.actors.policy.tokenizer
        ended = [one.ids[-1] in stop_ids for one in written]
        texts = [
            tokenizer.decode(one.ids[:-1] if end else one.ids, skip_special_tokens=True)
            for one, end in zip(written, ended, strict=True)
        ]
        scores = self.score([prompt.messages for prompt in mine], texts)
        return [
            Sampled(prompt, TokenSequence(prompt.ids, one.ids), text, end, score, one.logprobs)
            for prompt, one, text, end, score in zip(mine, written, texts, ended, scores, strict=True)
        ]

    def freeze(self, samples: Sequence[Sampled]) -> list[Frozen]:
        """Each through policy, reference and value model, in order."""
        frozen: list[Frozen | None] = [None] * len(samples)
        for part, sequences in self.micro_batches([sample.sequence for sample in samples]):
            for place, one in zip(part, self.actors.freeze(sequences)[: len(part)], strict=True):
                frozen[place] = one
        return [one for one in frozen if one is not None]

    def micro_batches(
        self, sequences: Sequence[TokenSequence]
    ) -> Iterator[tuple[Sequence[int], Sequence[TokenSequence]]]:
        """For passes without gradients: places of each micro-batch and what stands there.

        Where the models are sharded, some may have no places: they are there for the other processes' sake.
        """
        parts = batches_by_length([len(one) for one in sequences], self.micro_batch_tokens)
        end = min(self.actors.policy.stop_ids)
        for part, counts in in_step(parts, [], is_sharded=self.actors.is_sharded):
            yield part, [sequences[place] for place in part] if counts else [TokenSequence([end], [end])]

    def collect(self, prompts: Sequence[EncodedPrompt], stream: str) -> tuple[list[Sampled], list[Frozen]]:
        """The whole batch, in the order of `prompts`, on every process."""
        samples = self.sample(prompts, stream)
        mine = list(zip(samples, self.freeze(samples), strict=True))
        together = gathered(self.accelerator, mine, len(prompts))
        return [sample for sample, _ in together], [one for _, one in together]


def gathered(accelerator: Accelerator, mine: list[Any], count: int) -> list[Any]:
    """What the processes have, each for every n-th of `count` things, in the order of the things."""
    if accelerator.num_processes == 1:
        return mine
    found = gather_object([mine])
    whole: list[Any] = [None] * count
    for process, share in enumerate(found):
        whole[process :: accelerator.num_processes] = share
    return whole


def rollout_of(frozen: Sequence[Frozen], scores: Tensor, shaped: Callable[[Tensor], Tensor]) -> Rollout:
    """The batch as tensors (B, C). `scores` (B,) as they were given; `shaped` makes of them what is learnt from."""
    lengths = torch.tensor([len(row.old_logprobs) for row in frozen])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return Rollout(
        shaped(scores),
        mask,
        padded([row.old_logprobs for row in frozen]),
        padded([row.ref_logprobs for row in frozen]),
        padded([row.old_values for row in frozen]),
    )
