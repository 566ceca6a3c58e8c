"""SIGHUP: the settings are read again and put to work in a running server, or refused with one line."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.console import CommandError, say
from winnow.parts import MadeParts, make_parts

if TYPE_CHECKING:
    from proxy.app import Application
    from proxy.config import Settings
    from reward.metrics import ScoreMetrics

_AT_START_ONLY = ("host", "port", "workers", "shutdown_s", "cors_origins")
"""Of `server`: what the process and its socket were made with."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the settings come from, to be read once more."""

    file: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    scores_only: bool = False
    """For the scoring service: what is said of upstreams and routes has no meaning there."""

    def load(self) -> Settings:
        """Raises `CommandError`."""
        from proxy.config_loading import ConfigError, load_settings

        try:
            return load_settings(self.file, self.flags)
        except ConfigError as error:
            raise CommandError(str(error)) from error


@contextlib.asynccontextmanager
async def reloading(app: Application, source: Source, made: MadeParts, metrics: ScoreMetrics) -> AsyncIterator[None]:
    """Listens for SIGHUP while the block runs. On systems without that signal nothing is ever reloaded."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    number = getattr(signal, "SIGHUP", None)
    if number is not None:
        loop.add_signal_handler(number, asked.set)
    task = asyncio.create_task(_reload_when(asked, app, source, made, metrics))
    try:
        yield
    finally:
        if number is not None:
            loop.remove_signal_handler(number)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _reload_when(
    asked: asyncio.Event, app: Application, source: Source, made: MadeParts, metrics: ScoreMetrics
) -> None:
    while True:
        await asked.wait()
        asked.clear()
        try:
            made = await _reload(app, source, made, metrics)
            say("winnow has taken up the new settings")
        except Exception as error:  # whatever was wrong with the new settings: the old ones go on
            say(f"winnow goes on with the settings it has: {error}")


async def _reload(app: Application, source: Source, made: MadeParts, metrics: ScoreMetrics) -> MadeParts:
    from proxy.logs import configure_logging

    settings = source.load()
    running = app.live.gateway.settings
    fixed = [name for name in _AT_START_ONLY if getattr(settings.server, name) != getattr(running.server, name)]
    fixed = [f"server.{name}" for name in fixed] + [
        name for name in ("device", "dtype", "tracing") if getattr(settings, name) != getattr(running, name)
    ]
    if fixed:
        raise CommandError(f"{', '.join(fixed)} cannot change while the server runs: restart it")
    new = make_parts(settings, metrics, made, scores_only=source.scores_only)
    await app.reconfigure(settings, new.parts)
    configure_logging(settings.log)
    return new
