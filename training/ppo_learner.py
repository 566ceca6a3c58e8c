"""The gradient steps of PPO on language models: micro-batches, processes, two optimizers, a mixture of language data.

Every process holds all completions of a batch and evaluates its share of each minibatch; gradients are added up over
processes before a step. So one process or several, one micro-batch or many, whole weights or shards give the same step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW

from reward.network import batches_by_length
from training.actors import Actors, Frozen
from training.distributed import add_up_gradients, gathered, in_step, scattered_optimizer_state
from training.language_mix import LanguageMix
from training.options import OptionsError
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
        parts = [mine[part] for part in batches_by_length(lengths, self._micro_batch_tokens)]
        for own, counts in in_step(parts, rows[:1], is_sharded=self._actors.is_sharded):
            now = self._actors.evaluate([self.rows[row] for row in own.tolist()])
            short = width - now.logprobs.shape[1]
            padded = type(now)(nn.functional.pad(now.logprobs, (0, short)), nn.functional.pad(now.values, (0, short)))
            loss = loss_of(padded, own) if counts else 0.0 * (now.logprobs.sum() + now.values.sum())
            loss.backward()  # type: ignore[no-untyped-call]
        if self._mix is not None:
            self.mix_loss = self._mix.accumulate(process, self._actors)

    def step(self) -> GradNorms:
        norms = []
        for name, parameters, optimizer in zip(
            ("learning_rate", "value_learning_rate"), self._parameters, self._optimizers, strict=True
        ):
            add_up_gradients(self._accelerator, parameters)
            norm = float(gathered(nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)))
            if not math.isfinite(norm):
                raise OptionsError(f"{name}: the gradient is {norm}; the run cannot recover. Try a lower rate")
            norms.append(norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return GradNorms(*norms)

    def reduce(self, totals: Tensor) -> Tensor:
        if self._accelerator.num_processes == 1:
            return totals
        return cast(Tensor, self._accelerator.reduce(totals.to(self._actors.device), reduction="sum")).cpu()

    def state(self) -> list[dict[str, Any]]:
        """Of the optimizers, for the first process to write. All processes must call it alike."""
        keep = self._accelerator.is_main_process
        return [gathered(optimizer.state_dict(), keep=keep) for optimizer in self._optimizers]

    def load_state(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Puts back what `state` gave the first process. All processes must call it alike."""
        for optimizer, one in zip(self._optimizers, state, strict=True):
            optimizer.load_state_dict(scattered_optimizer_state(optimizer, dict(one)))


def _decayed(parameters: Sequence[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
