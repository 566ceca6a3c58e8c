"""A language model whose every forward waits for the test's permission, and fails on command."""

from __future__ import annotations

import threading
from typing import Any

WAIT_S = 30.0
"""How long a test waits for what must happen before it fails."""


class GatedModel:
    """Stands in for a transformers model: same call, same attributes, run by `model` once the test allows it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._allowed = threading.Semaphore(0)
        self._entered = threading.Semaphore(0)
        self._open = threading.Event()
        self.errors: list[Exception] = []
        """Raised by the next forwards, first to last."""
        self.batch_sizes: list[int] = []
        """Rows of every forward that was entered."""

    def __call__(self, **inputs: Any) -> Any:
        self.batch_sizes.append(len(inputs["input_ids"]))
        self._entered.release()
        if not self._open.is_set():
            assert self._allowed.acquire(timeout=WAIT_S), "the test never allowed this forward"
        if self.errors:
            raise self.errors.pop(0)
        return self._model(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def wait_entered(self) -> None:
        """Until one more forward waits at the gate (or has passed it)."""
        assert self._entered.acquire(timeout=WAIT_S), "no forward came"

    def allow(self, count: int = 1) -> None:
        self._allowed.release(count)

    def open(self) -> None:
        """From now on forwards pass at once."""
        self._open.set()
        self._allowed.release()
