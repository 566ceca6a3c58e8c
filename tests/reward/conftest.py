"""Tiny reward models on disk, built once for all tests of this room."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from reward.local import LocalScorer
from tests.fakes.models import build_tiny_encoder_reward_model, build_tiny_reward_model

FAMILIES = ("llama", "qwen2", "gpt2", "bert", "roberta")

TinyReward = Callable[[str], Path]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny models are slower on several."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_reward(tmp_path_factory: pytest.TempPathFactory) -> TinyReward:
    """The folder of a one-label model of a family. Shared: copy it before changing it."""
    home = tmp_path_factory.mktemp("rewards")

    def build(family: str) -> Path:
        folder = home / family
        if not folder.exists():
            if family == "bert":
                build_tiny_encoder_reward_model(folder)
            elif family == "roberta":
                # Positions are counted from pad_token_id + 1: 512 are left.
                build_tiny_encoder_reward_model(folder, family="roberta", max_positions=513)
            else:
                build_tiny_reward_model(folder, family=family)  # type: ignore[arg-type]  # one of FAMILIES
        return folder

    return build


@asynccontextmanager
async def started(folder: Path, **options: Any) -> AsyncIterator[LocalScorer]:
    """A scorer on the CPU, closed at the end."""
    scorer = LocalScorer(str(folder), device="cpu", **options)
    try:
        await scorer.start()
        yield scorer
    finally:
        await scorer.aclose()
