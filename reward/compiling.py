"""Networks compiled by torch, for any number and length of sequences, and their warm-up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from feedback.records import Message
from reward.errors import ModelLoadError

if TYPE_CHECKING:
    from reward.model import RewardModel

logger = logging.getLogger(__name__)

_PROMPT: list[Message] = [
    {"role": "user", "content": "Why is the sky blue? Explain it to a child of ten, please. " * 4}
]
_ANSWERS = ("I do not know.", "Air scatters blue light more than red light.", "Because it is. " * 9)


def compile_blocks(model: RewardModel, source: str, backend: str | Callable[..., object] = "inductor") -> None:
    """Compiles the network's repeated blocks, each by itself: their code is the same, and is compiled once for all.

    Raises `ModelLoadError` where there are none, or this machine cannot compile.
    """
    stacks = [module for module in model.network.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise ModelLoadError(f"{source}: no list of layers that could be compiled; set reward.compile to false")
    for block in max(stacks, key=len):
        block.compile(dynamic=True, backend=backend)
    try:
        warm_up(model)
    except Exception as error:
        # Whatever a compiler of others, or the C++ compiler behind it, stumbles over; its first paragraph says what.
        said = " ".join(str(error).partition("\n\n")[0].split())
        raise ModelLoadError(f"{source} cannot be compiled here: {said}; set reward.compile to false") from error


def warm_up(model: RewardModel) -> None:
    """Passes of the kinds that requests bring. The first of a kind compiles, and takes as long as thousands of them."""
    started = time.perf_counter()
    items = [model.renderer.render(_PROMPT, [{"role": "assistant", "content": text}]) for text in _ANSWERS]
    for batch in (items[:1], items[:2], items):
        model.raw_scores(batch)
        for _ in range(2):  # the second time with the prompt remembered
            model.raw_scores(model.shared(batch, remember=True))
    logger.info("compiled for this model's passes in %.0f s", time.perf_counter() - started)
