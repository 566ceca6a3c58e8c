"""The models of PPO, and the passes that it makes through them: policy, frozen reference, value model.

How many copies of the weights there are depends on `tuning`: with adapters the reference is the policy with them off;
with `top_layers` both share a trunk that is run once a rollout (`hydra`); with `full` the reference is a copy.

Shapes: b rows, P prompt columns, C completion columns, M completion tokens in all, V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from training.hydra import Hydra
from training.kl import entropy_of
from training.logprobs import completion_logits, token_logprobs
from training.policies import Policy
from training.ppo_update import Evaluation
from training.sequences import SequenceBatch, TokenSequence, collate_sequences, in_slots, padded
from training.value_models import RewardValues, StateValues

Precision = Callable[[], AbstractContextManager[Any]]
"""What passes run under: autocast, where that is asked for."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """What stays the same of a completion while the policy learns from it. On the CPU."""

    sequence: TokenSequence
    old_logprobs: Tensor  # (C,) under the policy that sampled it, by the pass that training makes
    ref_logprobs: Tensor  # (C,)
    old_values: Tensor  # (C,)
    entropy: float
    """Of the policy at the completion's tokens, mean, in nats."""
    states: Tensor | None  # (C, H) the reference's, before each token; where the value model reads them
    below: Tensor | None  # (P + C, H) of the shared trunk, where there is one


@dataclass(frozen=True, slots=True)
class Actors:
    """Policy, reference and value model. All in evaluation mode, without dropout."""

    policy: Policy
    value: StateValues | RewardValues
    temperature: float
    """That completions are drawn at; every log-probability is at the same."""
    device: torch.device
    hydra: Hydra | None = None
    reference: Policy | None = None
    """A frozen copy, where neither adapters nor a trunk stand for it."""
    precision: Precision = nullcontext

    @property
    def is_sharded(self) -> bool:
        """Each pass is one of all processes together: all must make as many."""
        return isinstance(self.policy.model, FSDPModule)

    def policy_parameters(self) -> list[nn.Parameter]:
        """Those that learn."""
        return [p for p in self.policy.model.parameters() if p.requires_grad]

    def value_parameters(self) -> list[nn.Parameter]:
        """Those that learn."""
        return [p for p in self.value.parameters() if p.requires_grad]

    def collate(self, sequences: Sequence[TokenSequence]) -> SequenceBatch:
        """On the device of the models."""
        return collate_sequences(sequences, self.policy.pad_id, self.device)

    @torch.no_grad()
    def freeze(self, sequences: Sequence[TokenSequence]) -> list[Frozen]:
        """One micro-batch through policy, reference and value model, before any step."""
        batch = self.collate(sequences)
        below = self.hydra.below(batch.input_ids, batch.attention_mask, batch.position_ids) if self.hydra else None
        with self.precision():
            logits = self.policy_logits(batch, below)
            ref_logits, states = self.reference_logits(batch, below)
            values = self.values(batch, states)
        tokens = batch.input_ids[batch.completion_mask]
        old = in_slots(token_logprobs(logits, tokens), batch.slots).cpu()
        ref = in_slots(token_logprobs(ref_logits, tokens), batch.slots).cpu()
        entropies = in_slots(entropy_of(logits.log_softmax(dim=-1)), batch.slots).sum(dim=1).cpu()
        frozen = []
        for place, sequence in enumerate(sequences):
            length, start = len(sequence.completion), batch.prompt_width - len(sequence.prompt)
            row_states = below_row = None
            if isinstance(self.value, StateValues):
                row_states = states[place, :length].cpu().clone()
            if below is not None:
                below_row = below[place, start : start + len(sequence)].cpu().clone()
            frozen.append(
                Frozen(
                    sequence,
                    old[place, :length].clone(),
                    ref[place, :length].clone(),
                    values[place, :length].float().cpu().clone(),
                    float(entropies[place]) / length,
                    row_states,
                    below_row,
                )
            )
        return frozen

    def evaluate(self, rows: Sequence[Frozen]) -> Evaluation:
        """One micro-batch through policy and value model as they are now, with gradients: (b, C)."""
        batch = self.collate([row.sequence for row in rows])
        below = self._below(batch, rows) if self.hydra else None
        with self.precision():
            logits = self.policy_logits(batch, below)
            states = None if rows[0].states is None else padded([_there(row.states) for row in rows]).to(self.device)
            values = self.values(batch, states)
        logprobs = token_logprobs(logits, batch.input_ids[batch.completion_mask])
        return Evaluation(in_slots(logprobs, batch.slots), values.float())

    def policy_logits(self, batch: SequenceBatch, below: Tensor | None = None) -> Tensor:
        """(M, V) in fp32, over the temperature."""
        network = self.policy.model if self.hydra is None else _on_trunk(self.hydra.top, below)
        return self._logits(network, batch)

    @torch.no_grad()
    def reference_logits(self, batch: SequenceBatch, below: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(M, V) over the temperature, and what its head saw before each completion token, (b, C, H)."""
        if self.hydra is not None:
            network, seen_by = _on_trunk(self.hydra.reference_top, below), self.hydra.reference_top
            adapters_off: AbstractContextManager[None] = nullcontext()
        elif self.reference is not None:
            network = seen_by = self.reference.model
            adapters_off = nullcontext()
        else:
            network = self.policy.model
            seen_by = network.get_base_model()
            adapters_off = self.policy.without_adapter()
        with adapters_off, _what_the_head_sees(seen_by) as seen:
            logits = self._logits(network, batch)
        (states,) = seen
        return logits, states

    def values(self, batch: SequenceBatch, states: Tensor | None) -> Tensor:
        """(b, C)"""
        if isinstance(self.value, RewardValues):
            return self.value(batch)  # type: ignore[no-any-return]
        assert states is not None
        return self.value(states)  # type: ignore[no-any-return]

    def _logits(self, network: Any, batch: SequenceBatch) -> Tensor:
        return completion_logits(
            network,
            batch.input_ids,
            batch.attention_mask,
            batch.completion_mask,
            position_ids=batch.position_ids,
            temperature=self.temperature,
        )

    def _below(self, batch: SequenceBatch, rows: Sequence[Frozen]) -> Tensor:
        """The trunk's hidden states of these rows, where the batch has their tokens: (b, T, H)."""
        found = [_there(row.below) for row in rows]
        result = found[0].new_zeros(*batch.input_ids.shape, found[0].shape[-1])
        for place, (row, states) in enumerate(zip(rows, found, strict=True)):
            start = batch.prompt_width - len(row.sequence.prompt)
            result[place, start : start + len(states)] = states
        return result.to(self.device)


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "kept by freeze()"
    return tensor


def _on_trunk(top: Any, below: Tensor | None) -> Callable[..., Any]:
    """Top layers as a network that is called like the whole model."""

    def network(*, input_ids: Tensor, **more: Any) -> Any:
        return top(inputs_embeds=below, **more)

    return network


@contextmanager
def _what_the_head_sees(model: Any) -> Iterator[list[Tensor]]:
    """Collects the input of the language-model head: the last hidden states of the positions that it is run on."""
    seen: list[Tensor] = []

    def remember(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0])

    handle = model.get_output_embeddings().register_forward_pre_hook(remember)
    try:
        yield seen
    finally:
        handle.remove()
