"""Supervised fine-tuning on demonstrations.

InstructGPT (Ouyang et al., arXiv 2203.02155), section 3.5 and appendix C.1: a pretrained model learns to write what
people wrote,

    loss(θ) = −1/N · Σ log p_θ(y_t | x, y_<t)        over all N tokens y_t of the completions of a step,

the token that ends an answer included and prompts left out (Huang et al., arXiv 2403.17031, detail 3). Departures:

1. The mean is over the tokens of a step, not over its rows, whatever the micro-batches and processes: long answers
   count for more than short ones, in the same way everywhere.
2. The paper trains for 16 epochs and lets a reward model choose, although the validation loss rises after one. Here the
   validation loss chooses, so that the default is two epochs.
3. No dropout, not even the model's own (the paper: 0.2 on residuals): log-probabilities are to be reproducible. Adam's
   second moment decays by 0.999 (the paper: 0.95).
4. Conversations of a step share rows without padding, where the model keeps them apart exactly (`rows`). This changes
   no loss.
5. Optional: low-rank adapters; every message of the assistant's instead of the last.

Kept: cosine down to a tenth of the peak without warm-up, batches of 32, a peak near 9.65e-6 for full tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import set_seed
from pydantic import Field
from torch import Tensor

from feedback.jsonl import Skipped, read_records
from feedback.records import Demonstration, Messages, parse_demonstration
from reward.devices import exact_dtype
from reward.errors import InputError
from training.conversations import Conversation, encode_conversation, fitted
from training.distributed import Placement
from training.fitting import DECIDING, RESULT, Objective, fit_policy
from training.loop import accumulate, start_accelerator
from training.options import OptionsError, PolicyOptions
from training.policies import Policy, load_policy_for
from training.rows import Layout, Rows, choose_layout
from training.runlog import Sample
from training.runs import claim, described, refuse_taken
from training.samples import greedy_samples


class SftOptions(PolicyOptions):
    """`winnow train sft`."""

    train: list[str]
    """Files of demonstrations: `prompt` and `completion`, or `messages` (JSONL, .jsonl.gz, Parquet)."""
    validation: list[str] = Field(default=[])
    """Held-out files: loss, early stopping, the prompts of samples."""
    every_turn: bool = False
    """Learn every message of the assistant's, those in prompts and earlier in `messages` too; else the completion."""
    packing: Literal["auto", "off"] = "auto"
    """`auto`: conversations share rows without padding, where this model keeps them apart exactly; else a row each."""

    epochs: float = Field(default=2.0, gt=0)
    """Passes over the demonstrations. Where there are validation files, the best weights are kept."""
    global_batch_size: int = Field(default=32, ge=1)
    """Demonstrations a step, over all processes and micro-batches."""
    warmup_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps over which the rate rises from 0 to its peak."""
    num_samples: int = Field(default=4, ge=0)
    """Held-out prompts that are answered at each validation, into `samples.jsonl`."""
    sample_tokens: int = Field(default=64, ge=1)
    """Longest answer among them."""


def train_sft(options: SftOptions) -> Path:
    """Runs (or goes on with) the training that `options` describe; returns the folder of the finished policy.

    Raises `OptionsError`, `feedback.jsonl.DataError`, `reward.errors.RewardError`.
    """
    run = Path(options.output)
    description = described(options, [*options.train, *options.validation])
    refuse_taken(run, description, result=RESULT)
    accelerator = start_accelerator(options)
    set_seed(options.seed)
    skipped = Skipped()
    train = read_demonstrations(options.train, options.skip_invalid, skipped)
    validation = read_demonstrations(options.validation, options.skip_invalid, skipped)
    policy = load_policy_for(options)
    data = [encoded for _, encoded in encode_demonstrations(policy, train, options, skipped)]
    held_out = encode_demonstrations(policy, validation, options, skipped)
    if not data:
        raise OptionsError(f"train: no demonstration that can be used in {', '.join(options.train)}")
    # Only now: what cannot be read or loaded leaves no run folder behind. All processes have looked before one writes.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        claim(run, description)
    references = [encoded for _, encoded in held_out]
    prompts = [one.prompt for one, _ in held_out[: options.num_samples]]
    objective = sft_objective(policy, data, references, options, prompts)
    return fit_policy(accelerator, policy, objective, options, run)


def sft_objective(
    policy: Policy,
    data: Sequence[Conversation],
    held_out: Sequence[Conversation],
    options: SftOptions,
    prompts: Sequence[Messages] = (),
) -> Objective:
    """What a step learns of `data`, how it is judged by `held_out`, and answers to `prompts` to look at."""
    layout = choose_layout(policy, options.packing, options.micro_batch_tokens)

    def sample(placement: Placement) -> list[Sample]:
        return greedy_samples(policy, placement, prompts, options.sample_tokens)

    return Objective(
        num_examples=len(data),
        learn=lambda placement, indices: learn(placement, [data[i] for i in indices], layout),
        validate=(lambda placement: validate(placement, held_out, layout)) if held_out else None,
        sample=sample if prompts else None,
    )


def learn(placement: Placement, items: Sequence[Conversation], layout: Layout) -> dict[str, float]:
    """Backward passes over the demonstrations of a step. Returns its metrics."""
    num_tokens = sum(item.num_completion_tokens for item in items)
    device = placement.accelerator.device
    totals = torch.zeros(2, dtype=exact_dtype(device), device=device)  # loss, correct

    def loss_of(weighted: tuple[Rows, float]) -> Tensor:
        rows, share = weighted
        logits = rows.logits(placement.network)  # (M, V)
        loss = torch.nn.functional.cross_entropy(logits, rows.tokens, reduction="sum") * share / num_tokens
        with torch.no_grad():
            correct = (logits.argmax(dim=-1) == rows.tokens).sum() * share
            totals.add_(torch.stack([loss.detach().to(totals.dtype), correct.to(totals.dtype)]))
        return loss

    accumulate(placement.accelerator, placement.network, _parts(placement, items, layout), loss_of)
    loss, correct = placement.added_up(totals)
    return {"loss": loss, "token_accuracy": correct / num_tokens, "completion_tokens": num_tokens}


@torch.no_grad()
def validate(placement: Placement, items: Sequence[Conversation], layout: Layout) -> dict[str, float]:
    """The mean loss of all held-out completion tokens; every process computes its share."""
    num_tokens = sum(item.num_completion_tokens for item in items)
    device = placement.accelerator.device
    total = torch.zeros(1, dtype=exact_dtype(device), device=device)
    for rows, share in _parts(placement, items, layout):
        total -= rows.logprobs(placement.plain).to(total.dtype).sum() * share
    (summed,) = placement.added_up(total)
    return {DECIDING: summed / num_tokens}


def _parts(placement: Placement, items: Sequence[Conversation], layout: Layout) -> list[tuple[Rows, float]]:
    def split(mine: Sequence[Conversation]) -> list[list[Conversation]]:
        return [[mine[i] for i in places] for places in layout.split([len(item) for item in mine])]

    device = placement.accelerator.device
    # By length, so that each process has about as many tokens as the others.
    by_length = sorted(items, key=len, reverse=True)
    return [(layout.rows(part, device), share) for part, share in placement.portions(by_length, split)]


def read_demonstrations(files: Sequence[str], skip_invalid: bool, skipped: Skipped) -> list[Demonstration]:
    """Demonstrations of files. Raises `DataError`."""
    paths = [Path(file).expanduser() for file in files]
    return list(read_records(paths, parse_demonstration, skipped if skip_invalid else None))


def encode_demonstrations(
    policy: Policy, demonstrations: Sequence[Demonstration], options: SftOptions, skipped: Skipped
) -> list[tuple[Demonstration, Conversation]]:
    """With their ids, cut to length. What cannot be encoded is skipped where that is allowed. Raises `OptionsError`."""
    encoded: list[tuple[Demonstration, Conversation]] = []
    for number, one in enumerate(demonstrations, start=1):
        try:
            whole = encode_conversation(policy, one.prompt, one.completion, every_turn=options.every_turn)
        except InputError as error:
            problem = f"demonstration {one.id or number}: {error}"
            if not options.skip_invalid:
                raise OptionsError(problem) from error
            skipped.add(problem)
            continue
        (cut,) = fitted(policy, [whole], policy.max_length)
        encoded.append((one, cut))
    return encoded
