"""`tuning: head`: the base stays as it is. Hidden states once for every completion, then a convex fit (`heads`)."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from feedback.jsonl import read_records
from feedback.rankings import ComparisonGroup
from feedback.records import Message, Messages, parse_prompt
from reward.ensembles import ManyHeads
from reward.network import PooledRewardModel, collate
from reward.rendering import Renderer
from training.batches import EncodedGroup, flatten
from training.features import compute_features, load_features
from training.heads import FittedHead, HeadData, domain_indices, fit_head
from training.models import TrainableReward, gated_head
from training.options import OptionsError, RewardOptions
from training.runlog import RunLog

_ANY_ANSWER: list[Message] = [{"role": "assistant", "content": "."}]


@dataclass(frozen=True, slots=True)
class FrozenFit:
    """What came of a fit, besides the head itself."""

    facts: dict[str, Any]
    """What was chosen on the way."""
    last_token: Tensor | None
    """(H,) weights for the last-token export, where asked for."""


def fit_frozen(
    accelerator: Accelerator,
    trainable: TrainableReward,
    groups: Sequence[ComparisonGroup],
    encoded: Sequence[EncodedGroup],
    options: RewardOptions,
    run: Path,
) -> FrozenFit:
    """Fits the head of `trainable` to the comparisons. On other processes than the main one the result is empty.

    `encoded` are `groups` as ids. Raises `OptionsError`, `DataError`, `InputError`.
    """
    network = cast(PooledRewardModel, trainable.network)
    domains, _ = domain_indices([group.source for group in groups], options.gated)
    if options.gated:
        _require_causal(network.to(accelerator.device).eval(), trainable.renderer, accelerator.device)
    gate_prompts, gate_groups = _read_gate_prompts(options, domains, trainable.renderer)
    everything = [*encoded, *gate_groups]
    with RunLog(run, active=accelerator.is_main_process) as log:
        bar = log.task("features", total=-(-len(everything) // accelerator.num_processes))
        with accelerator.autocast():
            compute_features(
                network,
                everything,
                run / "features",
                device=accelerator.device,
                max_tokens=options.micro_batch_tokens,
                rank=accelerator.process_index,
                num_ranks=accelerator.num_processes,
                on_progress=bar.advance,
            )
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return FrozenFit({}, None)
        openers = [_opener(group.prompt) for group in groups] + [_opener(prompt) for prompt in gate_prompts]
        data = _head_data(everything, openers, domains, len(encoded), run / "features", options)
        fits = [fit_head(_taught(data, own), len(domains), options.head_fit) for own in flatten(encoded).head_weights]
        last_token = _fit_last_token(data, options) if options.last_token_export else None
        _put_in(network, fits)
        network.to(accelerator.device)
        penalties = [dict(zip(domains, fitted.l2, strict=True)) for fitted in fits]
        chosen = penalties if len(fits) > 1 else penalties[0]
        gate_l2 = fits[0].gate_l2
        log.note(f"head fitted; L2 by cross-validation: {chosen}, gate {gate_l2}")
    shutil.rmtree(run / "features")
    return FrozenFit({"l2": chosen, "gate_l2": gate_l2, "gate_prompts": len(gate_groups)}, last_token)


def _taught(data: HeadData, head_weights: Tensor) -> HeadData:
    """The comparisons that count for a head, with what they count: `head_weights` (M,)."""
    kept = head_weights > 0
    return replace(
        data,
        better=data.better[kept],
        worse=data.worse[kept],
        weights=(data.weights * head_weights)[kept],
        margins=data.margins[kept],
        pair_group=data.pair_group[kept],
    )


def _put_in(network: PooledRewardModel, fits: Sequence[FittedHead]) -> None:
    """Makes what was fitted the network's head: one fit, or those of an ensemble."""
    gate_weight, gate_bias = fits[0].gate_weight, fits[0].gate_bias
    if gate_weight is not None and gate_bias is not None:
        network.head = gated_head((fits[0].weight, fits[0].bias), (gate_weight, gate_bias))
        return
    head = network.head.members if isinstance(network.head, ManyHeads) else cast(torch.nn.Linear, network.head)
    with torch.no_grad():
        head.weight.copy_(torch.cat([fitted.weight for fitted in fits]))
        head.bias.copy_(torch.cat([fitted.bias for fitted in fits]))


def _fit_last_token(data: HeadData, options: RewardOptions) -> Tensor:
    """The (H,) weights of one linear head on the last layer's last token alone."""
    width = data.features.shape[1] // (len(options.pooling) * max(len(options.layers), 1))
    start = (options.pooling.index("last") - len(options.pooling)) * width + data.features.shape[1]
    single = replace(
        data,
        features=data.features[:, start : start + width],
        group_domain=torch.zeros_like(data.group_domain),
        gate_features=data.gate_features[:0],
        gate_fold=data.gate_fold[:0],
        gate_domain=data.gate_domain[:0],
    )
    return fit_head(single, 1, options.head_fit).weight[0]


def _head_data(
    groups: Sequence[EncodedGroup],
    openers: Sequence[str],
    domains: Sequence[str],
    num_judged: int,
    folder: Path,
    options: RewardOptions,
) -> HeadData:
    """The first `num_judged` groups have comparisons, the others are prompts for the gate."""
    features, prompts = load_features(groups, folder)
    judged = groups[:num_judged]
    flat = flatten(judged)
    weights = flat.weights
    if options.head_fit.pair_weighting == "pair":
        weights = torch.tensor([pair.weight for group in judged for pair in group.pairs])
    folds = torch.tensor([_fold(opener, options.head_fit.folds, options.seed) for opener in openers])
    of_domain = {name: number for number, name in enumerate(domains)}
    numbers = torch.tensor([of_domain.get(group.source, 0) for group in groups])
    return HeadData(
        features=features[: len(flat.items)],
        prompt_features=prompts[:num_judged],
        better=flat.better,
        worse=flat.worse,
        weights=weights,
        margins=flat.margins,
        pair_group=torch.tensor([g for g, group in enumerate(judged) for _ in group.pairs]),
        completion_group=torch.tensor([g for g, group in enumerate(judged) for _ in group.items]),
        group_fold=folds[:num_judged],
        group_domain=numbers[:num_judged],
        gate_features=prompts[num_judged:],
        gate_fold=folds[num_judged:],
        gate_domain=numbers[num_judged:],
    )


def _read_gate_prompts(
    options: RewardOptions, domains: Sequence[str], renderer: Renderer
) -> tuple[list[Messages], list[EncodedGroup]]:
    prompts: list[Messages] = []
    groups: list[EncodedGroup] = []
    for source, files in options.gate_prompts.items():
        if source not in domains:
            raise OptionsError(
                f"gate_prompts.{source}: no such source; with gated: true there are {', '.join(domains)}"
            )
        for record in read_records([Path(file).expanduser() for file in files], parse_prompt):
            prompts.append(record.prompt)
            groups.append(EncodedGroup([renderer.render(record.prompt, _ANY_ANSWER)], [], source))
    return prompts, groups


@torch.inference_mode()
def _require_causal(network: PooledRewardModel, renderer: Renderer, device: torch.device) -> None:
    """A gate must see the prompt only; in a bidirectional base the prompt's states know the answer."""
    prompt: list[Message] = [{"role": "user", "content": "Which is it?"}]
    answers: list[list[Message]] = [
        [{"role": "assistant", "content": text}] for text in ("This one.", "The other one.")
    ]
    _, prompts = network.features(collate([renderer.render(prompt, answer) for answer in answers], device))
    if not torch.allclose(prompts[0], prompts[1], atol=1e-3, rtol=1e-3):
        raise OptionsError("gated: the base lets a prompt's states depend on the answer; gates need a causal decoder")


def _fold(opener: str, folds: int, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{opener}".encode()).digest()[:8], "big") % folds


def _opener(prompt: Messages) -> str:
    """A conversation's first user message: continuations of one conversation must not be torn between folds."""
    opener = next((m for m in prompt if m["role"] == "user"), prompt[0])
    return json.dumps(opener.get("content"), sort_keys=True)
