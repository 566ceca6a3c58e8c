"""Direct preference optimisation: a policy learns from comparisons without a reward model and without sampling.

Rafailov et al., arXiv 2305.18290. With the implicit reward r(x, y) = β · log π_θ(y|x)/π_ref(y|x),

    loss(θ) = −E[ log σ(r(x, y_w) − r(x, y_l)) ]                                                          (eq. 7)

where π_ref is the policy as it was before training, best one that was fine-tuned on such answers. Departures:

1. Rankings are taken as all their pairs, kept together and weighted 1/C(K,2), each completion encoded once, as
   InstructGPT (arXiv 2203.02155, section 3.5) does for reward models; ties carry no loss.
2. AdamW and a cosine instead of RMSprop and a constant rate.
3. The reference is never a second model in memory: its log-probabilities are computed before the first step and kept
   (`precomputed`), or the adapters are switched off (`adapter_off`).
4. Completions share rows without padding, where the model keeps them apart exactly (`rows`). This changes no loss.
5. Optional: label smoothing (conservative DPO), margins in the data, low-rank adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object, set_seed
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from feedback.jsonl import Skipped, replacing
from feedback.rankings import ComparisonGroup, Pair
from reward.devices import exact_dtype
from reward.errors import InputError
from training.comparisons import read_comparisons
from training.conversations import Conversation, encode_conversation, fitted
from training.distributed import Placement
from training.fitting import DECIDING, RESULT, Objective, fit_policy
from training.loop import accumulate, start_accelerator
from training.losses import dpo_losses
from training.options import OptionsError, PolicyOptions
from training.policies import Policy, load_policy_for
from training.rows import Layout, choose_layout
from training.runs import claim, described, refuse_taken

REFERENCE_NAME = "reference.safetensors"
ROUNDING = 1e-3
"""Nats. Pairs whose log-ratios differ by less count as half right: before the first step all of them do."""


class DpoOptions(PolicyOptions):
    """`winnow train dpo`."""

    train: list[str]
    """Files of preferences and rankings (JSONL, .jsonl.gz, Parquet)."""
    validation: list[str] = Field(default=[])
    """Held-out files: loss, accuracy, early stopping."""
    beta: float = Field(default=0.1, gt=0)
    """How much leaving the reference costs: less lets the policy go further."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the comparisons that are taken to be the wrong way round."""
    reference: Literal["precomputed", "adapter_off"] = "precomputed"
    """`precomputed`: the reference's log-probabilities are computed once, before the first step. `adapter_off`: anew in
    each step, with the adapters switched off; starts at once, and costs more from the second epoch on."""
    packing: Literal["auto", "off"] = "auto"
    """`auto`: completions share rows without padding, where this model keeps them apart exactly; else a row each."""

    global_batch_size: int = Field(default=64, ge=1)
    """Prompts a step, over all processes and micro-batches; all of a prompt's comparisons stay together."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak. Adapters take some ten times as much."""
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the rate rises from 0 to its peak."""


@dataclass(frozen=True, slots=True)
class ComparedGroup:
    """One prompt's completions as ids, each once, with its comparisons."""

    items: list[Conversation]
    pairs: Sequence[Pair]
    place: int
    """Of its first completion among those of all groups."""

    @property
    def num_tokens(self) -> int:
        """Of all completions, each with its prompt."""
        return sum(map(len, self.items))

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(map(len, self.items))


def train_dpo(options: DpoOptions) -> Path:
    """Runs (or goes on with) the training that `options` describe; returns the folder of the finished policy.

    Raises `OptionsError`, `feedback.jsonl.DataError`, `reward.errors.RewardError`.
    """
    run = Path(options.output)
    description = described(options, [*options.train, *options.validation])
    refuse_taken(run, description, result=RESULT)
    if options.reference == "adapter_off" and options.tuning != "lora":
        raise OptionsError("reference: adapter_off needs tuning: lora; without adapters choose precomputed")
    accelerator = start_accelerator(options)
    set_seed(options.seed)
    skipped = Skipped()
    train = read_comparisons(options.train, options.skip_invalid, skipped)
    validation = read_comparisons(options.validation, options.skip_invalid, skipped)
    policy = load_policy_for(options)
    groups = encode_comparisons(policy, train, options, skipped)
    held_out = encode_comparisons(policy, validation, options, skipped, first=sum(len(g.items) for g in groups))
    if not groups:
        raise OptionsError(f"train: no decided comparison that can be used in {', '.join(options.train)}")
    # Only now: what cannot be read or loaded leaves no run folder behind. All processes have looked before one writes.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        claim(run, description)
    objective = dpo_objective(policy, groups, held_out, options, run / REFERENCE_NAME)
    return fit_policy(accelerator, policy, objective, options, run)


def dpo_objective(
    policy: Policy,
    groups: Sequence[ComparedGroup],
    held_out: Sequence[ComparedGroup],
    options: DpoOptions,
    reference_file: Path,
) -> Objective:
    """What a step learns of `groups`, and how it is judged by `held_out`."""
    layout = choose_layout(policy, options.packing, options.micro_batch_tokens)
    reference = _Reference(policy, options.reference == "adapter_off", reference_file)

    def prepare(placement: Placement) -> None:
        reference.compute(placement, [*groups, *held_out], layout)

    return Objective(
        num_examples=len(groups),
        learn=lambda placement, indices: _learn(placement, [groups[i] for i in indices], reference, layout, options),
        validate=(lambda placement: _validate(placement, held_out, reference, layout, options)) if held_out else None,
        prepare=prepare,
    )


def encode_comparisons(
    policy: Policy, groups: Sequence[ComparisonGroup], options: DpoOptions, skipped: Skipped, first: int = 0
) -> list[ComparedGroup]:
    """With their ids; the completions of a prompt share what is left of it after a cut.

    `first`: the place of the first completion. Raises `OptionsError`.
    """
    encoded: list[ComparedGroup] = []
    for number, group in enumerate(groups, start=1):
        try:
            whole = [encode_conversation(policy, group.prompt, completion) for completion in group.completions]
        except InputError as error:
            problem = f"prompt {number} of {group.source}: {error}"
            if not options.skip_invalid:
                raise OptionsError(problem) from error
            skipped.add(problem)
            continue
        items = fitted(policy, whole, policy.max_length)
        encoded.append(ComparedGroup(items, group.pairs, first))
        first += len(items)
    return encoded


class _Reference:
    """Log-probabilities of completions under the policy as it was before training."""

    def __init__(self, policy: Policy, adapter_off: bool, file: Path) -> None:
        self._policy = policy
        self._adapter_off = adapter_off
        self._file = file
        self._known = torch.empty(0)

    @torch.no_grad()
    def compute(self, placement: Placement, groups: Sequence[ComparedGroup], layout: Layout) -> None:
        """All of them, shared out over the processes, and onto the disk for a run that goes on."""
        if self._adapter_off:
            return
        if not self._file.is_file():
            self._policy.model.eval()
            found: list[tuple[int, float]] = []
            for part, share in _portions(placement, groups, layout):
                places = [group.place + k for group in part for k in range(len(group.items))]
                if share:
                    found.extend(zip(places, _logprobs(placement, placement.plain, part, layout).tolist(), strict=True))
                else:
                    _logprobs(placement, placement.plain, part, layout)
            known = dict(gather_object(found))
            if placement.accelerator.is_main_process:
                with replacing(self._file) as partial:
                    save_file({"logprobs": torch.tensor([known[i] for i in range(len(known))])}, partial)
            placement.accelerator.wait_for_everyone()
        self._known = load_file(self._file)["logprobs"]

    @torch.no_grad()
    def of(self, placement: Placement, part: Sequence[ComparedGroup], layout: Layout) -> Tensor:
        """(S,) for the completions of these groups."""
        if not self._adapter_off:
            places = [group.place + k for group in part for k in range(len(group.items))]
            return self._known[places].to(placement.accelerator.device)
        was_training = self._policy.model.training
        self._policy.model.eval()
        with self._policy.without_adapter():
            found = _logprobs(placement, placement.plain, part, layout)
        self._policy.model.train(was_training)
        return found


def _portions(
    placement: Placement, groups: Sequence[ComparedGroup], layout: Layout
) -> list[tuple[list[ComparedGroup], float]]:
    def split(mine: Sequence[ComparedGroup]) -> list[list[ComparedGroup]]:
        sizes = [(len(group.items), group.longest, group.num_tokens) for group in mine]
        return [[mine[i] for i in places] for places in layout.split_groups(sizes)]

    return placement.portions(sorted(groups, key=lambda group: group.num_tokens, reverse=True), split)


def _logprobs(placement: Placement, network: Any, part: Sequence[ComparedGroup], layout: Layout) -> Tensor:
    """(S,) the log-probability of each completion of these groups."""
    items = [item for group in part for item in group.items]
    rows = layout.rows(items, placement.accelerator.device)
    return rows.sums(rows.logprobs(network), len(items))


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Of one micro-batch, added up over its M pairs."""

    loss: Tensor  # () weighted so that each prompt counts as one
    facts: Tensor  # (6,) that loss; pairs in the right order, margins, rewards of chosen and rejected; their number


def _compare(
    placement: Placement,
    network: Any,
    part: Sequence[ComparedGroup],
    reference: _Reference,
    layout: Layout,
    options: DpoOptions,
) -> _Outcome:
    before = reference.of(placement, part, layout)  # (S,)
    logratios = _logprobs(placement, network, part, layout) - before  # (S,)
    better, worse, weights, margins = [], [], [], []
    offset = 0
    for group in part:
        for pair in group.pairs:
            better.append(offset + pair.better)
            worse.append(offset + pair.worse)
            weights.append(pair.weight / len(group.pairs))
            margins.append(pair.margin)
        offset += len(group.items)
    weight = torch.tensor(weights, device=logratios.device)  # (M,)
    chosen, rejected = logratios[better], logratios[worse]
    losses = dpo_losses(
        chosen,
        rejected,
        options.beta,
        margins=torch.tensor(margins, device=logratios.device),
        label_smoothing=options.label_smoothing,
    )
    loss = (weight * losses).sum()
    with torch.no_grad():
        gaps = chosen - rejected
        tied = gaps.abs() <= ROUNDING
        exact = exact_dtype(loss.device)
        correct = (gaps > 0).to(exact).masked_fill(tied, 0.5)
        count = torch.tensor(float(len(better)), dtype=exact, device=loss.device)
        facts = torch.stack(
            [
                loss.to(exact),
                correct.sum(),
                options.beta * gaps.to(exact).sum(),
                options.beta * chosen.to(exact).sum(),
                options.beta * rejected.to(exact).sum(),
                count,
            ]
        )
    return _Outcome(loss, facts)


def _learn(
    placement: Placement,
    groups: Sequence[ComparedGroup],
    reference: _Reference,
    layout: Layout,
    options: DpoOptions,
) -> dict[str, float]:
    """Backward passes over the prompts of a step. Returns its metrics."""
    device = placement.accelerator.device
    totals = torch.zeros(6, dtype=exact_dtype(device), device=device)

    def loss_of(weighted: tuple[list[ComparedGroup], float]) -> Tensor:
        part, share = weighted
        outcome = _compare(placement, placement.network, part, reference, layout, options)
        totals.add_(outcome.facts * share)
        return outcome.loss * share / len(groups)

    accumulate(placement.accelerator, placement.network, _portions(placement, groups, layout), loss_of)
    loss, correct, margin, chosen, rejected, pairs = placement.added_up(totals)
    return {
        "loss": loss / len(groups),
        "accuracy": correct / pairs,
        "margin": margin / pairs,
        "chosen_reward": chosen / pairs,
        "rejected_reward": rejected / pairs,
        "pairs": pairs,
    }


@torch.no_grad()
def _validate(
    placement: Placement,
    groups: Sequence[ComparedGroup],
    reference: _Reference,
    layout: Layout,
    options: DpoOptions,
) -> dict[str, float]:
    """Over all held-out comparisons; every process computes its share."""
    device = placement.accelerator.device
    totals = torch.zeros(6, dtype=exact_dtype(device), device=device)
    for part, share in _portions(placement, groups, layout):
        totals += _compare(placement, placement.plain, part, reference, layout, options).facts * share
    loss, correct, margin, _, _, pairs = placement.added_up(totals)
    return {
        DECIDING: loss / len(groups),
        "validation_accuracy": correct / pairs,
        "validation_margin": margin / pairs,
    }
