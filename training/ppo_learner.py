"""The gradient steps of PPO on language models: micro-batches, processes, two optimizers, a mixture of language data.

Every process holds all completions of a batch and evaluates its share of each minibatch; gradients are added up over
processes before a step. So one process or several, one micro-batch or many, give the same step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW

from reward.network import batches_by_length
from training.actors import Actors, Frozen
from training.language_mix import LanguageMix
from training.ppo_update import GradNorms, LossOf


class LanguageLearner:
    """The `Learner` of language models. Holds the optimizers; `rows` is set anew for each batch of completions."""

    def __init__(
        self,
        accelerator: Accelerator,
        actors: Actors,
        *,
        policy_rate: float,
        value_rate: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_grad_norm: float,
        micro_batch_tokens: int,
        mix: LanguageMix | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._actors = actors
        self._peaks = (policy_rate, value_rate)
        self._max_grad_norm = max_grad_norm
        self._micro_batch_tokens = micro_batch_tokens
        self._mix = mix
        self.rows: Sequence[Frozen] = ()
        self.mix_loss = 0.0
        """Of the language data, nats a token, in the last step."""
        self._parameters = (actors.policy_parameters(), actors.value_parameters())
        self._optimizers = tuple(
            AdamW(_decayed(parameters, weight_decay), lr=rate, betas=betas, eps=eps)
            for parameters, rate in zip(self._parameters, self._peaks, strict=True)
        )

    def set_rate(self, factor: float) -> None:
        """Of both networks, as a share of their peaks."""
        for optimizer, peak in zip(self._optimizers, self._peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor

    def accumulate(self, rows: Tensor, loss_of: LossOf) -> None:
        process = self._accelerator
        mine = rows[process.process_index :: process.num_processes]
        width = max(len(row.old_logprobs) for row in self.rows)
        lengths = [len(self.rows[row].sequence) for row in mine.tolist()]
        for part in batches_by_length(lengths, self._micro_batch_tokens):
            own = mine[part]
            now = self._actors.evaluate([self.rows[row] for row in own.tolist()])
            short = width - now.logprobs.shape[1]
            padded = type(now)(nn.functional.pad(now.logprobs, (0, short)), nn.functional.pad(now.values, (0, short)))
            loss_of(padded, own).backward()  # type: ignore[no-untyped-call]
        if self._mix is not None:
            self.mix_loss = self._mix.accumulate(process, self._actors)

    def step(self) -> GradNorms:
        norms = []
        for parameters, optimizer in zip(self._parameters, self._optimizers, strict=True):
            self._add_up(parameters)
            norms.append(float(nn.utils.clip_grad_norm_(parameters, self._max_grad_norm, error_if_nonfinite=True)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return GradNorms(*norms)

    def reduce(self, totals: Tensor) -> Tensor:
        if self._accelerator.num_processes == 1:
            return totals
        return cast(Tensor, self._accelerator.reduce(totals.to(self._actors.device), reduction="sum")).cpu()

    def state(self) -> list[dict[str, Any]]:
        """Of the optimizers."""
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Puts back what `state` gave."""
        for optimizer, one in zip(self._optimizers, state, strict=True):
            optimizer.load_state_dict(dict(one))

    def _add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gradients over all processes, as one buffer: a process without rows in a minibatch has none of its own."""
        if self._accelerator.num_processes == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        whole = cast(Tensor, self._accelerator.reduce(torch.cat([g.flatten() for g in grads]), reduction="sum"))
        for parameter, total in zip(parameters, torch.split(whole, [g.numel() for g in grads]), strict=True):
            parameter.grad = total.view_as(parameter)


def _decayed(parameters: Sequence[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
