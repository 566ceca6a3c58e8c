"""Hidden states of a frozen base, computed once for every completion and kept on disk, so that a killed run goes on.

Shapes: N completions, D pooled features, G groups, P prompt features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from feedback.jsonl import replacing
from reward.batching import CPU_BATCH_TOKENS
from reward.network import PooledRewardModel, batches_by_length, collate
from reward.rendering import Rendered
from training.batches import EncodedGroup

GROUPS_IN_CHUNK = 64


def compute_features(
    network: PooledRewardModel,
    groups: Sequence[EncodedGroup],
    folder: Path,
    *,
    device: torch.device,
    max_tokens: int,
    rank: int = 0,
    num_ranks: int = 1,
    on_progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Computes this rank's share of the chunks that `folder` does not hold yet."""
    folder.mkdir(parents=True, exist_ok=True)
    network.to(device).eval()
    if device.type == "cpu":
        # What a batch computes must fit the caches: 8192 tokens at once take a tenth to a fifth longer.
        max_tokens = min(max_tokens, CPU_BATCH_TOKENS)
    for number, chunk in enumerate(_chunks(groups)):
        if number % num_ranks != rank:
            continue
        path = _chunk_path(folder, number, chunk)
        if not path.is_file():
            completions, prompts = _chunk_features(network, chunk, device, max_tokens)
            with replacing(path) as partial:
                save_file({"completions": completions, "prompts": prompts}, partial)
        on_progress(len(chunk))


def load_features(groups: Sequence[EncodedGroup], folder: Path) -> tuple[Tensor, Tensor]:
    """(N, D) features of all completions, group after group, and (G, P) of the prompts."""
    loaded = [load_file(_chunk_path(folder, number, chunk)) for number, chunk in enumerate(_chunks(groups))]
    return torch.cat([c["completions"] for c in loaded]), torch.cat([c["prompts"] for c in loaded])


@torch.inference_mode()
def _chunk_features(
    network: PooledRewardModel, chunk: Sequence[EncodedGroup], device: torch.device, max_tokens: int
) -> tuple[Tensor, Tensor]:
    items: list[Rendered] = [item for group in chunk for item in group.items]
    pooled: list[Tensor] = [torch.empty(0)] * len(items)
    prompts: list[Tensor] = [torch.empty(0)] * len(items)
    for batch in batches_by_length([len(item) for item in items], max_tokens):
        completion, prompt = network.features(collate([items[i] for i in batch], device))
        for row, index in enumerate(batch):
            pooled[index], prompts[index] = completion[row].cpu(), prompt[row].cpu()
    firsts, position = [], 0
    for group in chunk:
        firsts.append(prompts[position])
        position += len(group.items)
    return torch.stack(pooled), torch.stack(firsts)


def _chunks(groups: Sequence[EncodedGroup]) -> list[Sequence[EncodedGroup]]:
    return [groups[start : start + GROUPS_IN_CHUNK] for start in range(0, len(groups), GROUPS_IN_CHUNK)]


def _chunk_path(folder: Path, number: int, chunk: Sequence[EncodedGroup]) -> Path:
    """Named by the ids it was computed from: changed data never meets old features."""
    digest = hashlib.sha256(repr([item.ids for group in chunk for item in group.items]).encode())
    return folder / f"{number:05d}-{digest.hexdigest()[:16]}.safetensors"
