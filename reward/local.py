"""LocalScorer: rewards computed in this process. Render, batch, run, normalise."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING

from feedback.records import Messages
from reward.batching import BatchingOptions
from reward.batching_worker import BatchingWorker
from reward.devices import each_device
from reward.errors import InputError, ScoringError
from reward.manifest import Aggregate
from reward.metrics import ScoreMetrics
from reward.objectives import ObjectiveChoice
from reward.prefill import Prefilling
from reward.rendering import Rendered
from reward.replicas import Replica
from reward.scorer import RawScore, Score, TemplatedText
from reward.shared_prefix import LivePrefixes, SharingOptions

if TYPE_CHECKING:
    from reward.model import RewardModel


logger = logging.getLogger(__name__)


class LocalScorer:
    """The `Scorer` over a model on this machine.

    Loading and scoring run on threads of their own, one a device, rendering on the default pool: the event loop never
    waits.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str | None = None,
        device: str = "auto",
        devices: Sequence[str] = (),
        dtype: str = "auto",
        batching: BatchingOptions | None = None,
        metrics: ScoreMetrics | None = None,
        trust_remote_code: bool = False,
        aggregate: Aggregate | None = None,
        objectives: ObjectiveChoice | None = None,
        turns: threading.Lock | None = None,
        sharing: SharingOptions | None = None,
        compiled: bool = False,
    ) -> None:
        """`source`: a folder, a hub id or `default`; `name`: what clients call it, from the model itself if None;
        `devices`: where copies of it run (see `reward.devices.each_device`), one on `device` if none is named;
        `aggregate`: the rule of an ensemble, its own if None; `objectives`: the same of a model with several.

        `turns`: held while the device computes, where threads of this process must not do so at once.
        """
        self._source = source
        self._name = name
        self._devices = tuple(devices) or (device,)
        self._dtype = dtype
        self._trust_remote_code = trust_remote_code
        self._aggregate = aggregate
        self._objectives = objectives
        self._metrics = metrics
        self._sharing = sharing
        self._compiled = compiled
        self._turns = turns
        self._replicas: list[Replica] = []
        self._model: RewardModel | None = None
        self._prefixes = LivePrefixes()
        self._batching = batching or BatchingOptions()
        self._worker: BatchingWorker[Rendered, RawScore] | None = None
        self._prefilling: Prefilling | None = None

    @property
    def name(self) -> str:
        if self._name is not None:
            return self._name
        return self._model.manifest.name if self._model else self._source

    @property
    def ready(self) -> bool:
        return self._model is not None

    @property
    def queue_depth(self) -> int:
        """Completions waiting to be scored."""
        return self._worker.queue_depth if self._worker is not None else 0

    async def start(self) -> None:
        devices = await asyncio.to_thread(each_device, self._devices)
        self._replicas = [Replica(device, self._turns) for device in devices]
        for replica in self._replicas:
            await replica.load(self._load)
        model = self._replicas[0].model
        options = self._batching.on_device(model.device.type)
        self._worker = BatchingWorker(
            [partial(self._run_batch, replica) for replica in self._replicas],
            options,
            self._metrics.queue_depth.set if self._metrics else _ignore_depth,
            take=lambda items: model.take_batch(items, options),
            key_of=lambda item: item.prefix,
        )
        self._worker.start()
        self._prefilling = Prefilling(self._worker, self._replicas, self._prefixes)
        self._model = model

    async def score(self, prompt: Messages, completions: Sequence[Messages]) -> list[Score]:
        self._check_size(len(completions))
        return await self._scores(await asyncio.to_thread(self._render, self._loaded(), prompt, completions))

    def expecting(self, prompt: Messages) -> AbstractAsyncContextManager[None]:
        """As `Expects` says; a prompt that is long enough is encoded ahead."""
        if self._prefilling is None:
            raise ScoringError(f"the reward model {self._source!r} is not loaded")
        return self._prefilling.expecting(prompt)

    async def score_texts(self, texts: Sequence[TemplatedText]) -> list[Score]:
        self._check_size(len(texts))
        renderer = self._loaded().renderer
        return await self._scores(
            await asyncio.to_thread(lambda: [renderer.render_text(one.text, one.prompt) for one in texts])
        )

    def _check_size(self, count: int) -> None:
        if count > self._batching.max_queue:
            raise InputError(
                f"{count} completions in one call, but the queue holds {self._batching.max_queue}: "
                "send fewer, or raise reward.max_queue"
            )

    async def _scores(self, rendered: Sequence[Rendered]) -> list[Score]:
        model, worker = self._loaded(), self._worker
        assert worker is not None, "made when the model was loaded"
        if not rendered:
            return []
        raw_scores = await worker.submit(rendered)
        return [model.manifest.score(raw, item) for raw, item in zip(raw_scores, rendered, strict=True)]

    def reward_at_percentile(self, percentile: float) -> float | None:
        return self._loaded().manifest.normalisation.at_percentile(percentile)

    async def aclose(self) -> None:
        if self._worker is not None:
            await self._worker.aclose()
        self._model = None
        for replica in self._replicas:
            replica.close()

    def _load(self, device: str) -> RewardModel:
        # Imported on the thread too: torch takes seconds.
        from reward.model import load_reward_model

        return load_reward_model(
            self._source,
            device=device,
            dtype=self._dtype,
            trust_remote_code=self._trust_remote_code,
            aggregate=self._aggregate,
            objectives=self._objectives,
            sharing=self._sharing,
            compiled=self._compiled,
        )

    def _loaded(self) -> RewardModel:
        if self._model is None:
            raise ScoringError(f"the reward model {self._source!r} is not loaded")
        return self._model

    def _render(self, model: RewardModel, prompt: Messages, completions: Sequence[Messages]) -> list[Rendered]:
        if not prompt:
            raise InputError("the prompt has no messages")
        if not all(completions):
            raise InputError("a completion has no messages")
        try:
            items = [model.renderer.render(prompt, completion) for completion in completions]
            return self._prefixes.unified(model.shared(items, remember=True))
        except InputError:
            raise
        except Exception as error:
            # Messages come from clients in shapes nobody thought of; the answer must not fail for it.
            logger.exception("rendering failed")
            raise InputError(f"the messages cannot be rendered: {type(error).__name__}") from error

    async def _run_batch(self, replica: Replica, items: Sequence[Rendered]) -> list[RawScore]:
        started = time.perf_counter()
        scores = await replica.run(lambda model: model.raw_scores(items))
        if self._metrics is not None:
            self._metrics.batch_size.observe(len(items))
            self._metrics.duration.observe(time.perf_counter() - started)
        return scores


def _ignore_depth(depth: int) -> None:
    """Without metrics nobody asks."""
