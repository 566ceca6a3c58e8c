"""Copies of one reward model, each on a device and a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from reward.model import RewardModel

ResultT = TypeVar("ResultT")


class Replica:
    """One copy. Whatever it does runs on its thread: the event loop never waits."""

    def __init__(self, device: str, turns: threading.Lock | None = None) -> None:
        """`turns`: held while the device computes, where threads of this process must not do so at once."""
        self.device = device
        self._turns: AbstractContextManager[object] = turns or nullcontext()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"reward-model-{device}")
        self._model: RewardModel | None = None

    @property
    def model(self) -> RewardModel:
        assert self._model is not None, "loaded before it is asked anything"
        return self._model

    async def load(self, load: Callable[[str], RewardModel]) -> None:
        """Raises what `load`, which is given the device's name, raises. One replica at a time: loading a model changes
        torch's defaults for a moment."""
        self._model = await self._on_thread(lambda: load(self.device))

    async def run(self, work: Callable[[RewardModel], ResultT]) -> ResultT:
        return await self._on_thread(lambda: work(self.model))

    def close(self) -> None:
        """A forward pass that is under way ends by itself; nobody waits for it any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _on_thread(self, work: Callable[[], ResultT]) -> ResultT:
        def in_turn() -> ResultT:
            with self._turns:
                return work()

        return await asyncio.get_running_loop().run_in_executor(self._thread, in_turn)
