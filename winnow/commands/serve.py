"""`winnow serve`: the proxy with its real parts, on a socket, until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from winnow.console import CommandError, progress_console, say
from winnow.parts import make_parts
from winnow.reloading import Source, reloading
from winnow.version import __version__
from winnow.workers import supervise

if TYPE_CHECKING:
    import uvicorn

    from proxy.config import Settings

_BACKLOG = 2048
_GC_THRESHOLD = 10_000
"""Objects made and not freed before the youngest are looked through; Python's 700 cost a twentieth of a request."""


def serve(
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
    host: str | None = typer.Option(None, help="Address to listen on.  [default: 127.0.0.1]"),
    port: int | None = typer.Option(None, help="Port to listen on.  [default: 8000]"),
    upstream_url: str | None = typer.Option(None, help="OpenAI-compatible base URL. Without: the embedded model."),
    upstream_key: str | None = typer.Option(None, help="Key for the upstream; better given as WINNOW_UPSTREAM_KEY."),
    local_model: str | None = typer.Option(None, help="Folder, hub id or package:NAME of the embedded model."),
    reward_model: str | None = typer.Option(None, help="Folder, hub id, `default` or `none`."),
    best_of: int | None = typer.Option(None, help="Candidates a request.  [default: 4]"),
    min_reward: str | None = typer.Option(None, help="Least reward to accept: a number, or a percentile: p20."),
    on_reject: str | None = typer.Option(None, help="best, refuse, error or fallback."),
    device: str | None = typer.Option(None, help="auto, cpu, cuda, cuda:1, mps."),
    dtype: str | None = typer.Option(None, help="auto, float32, bfloat16, float16."),
) -> None:
    """The proxy: best-of-N behind an OpenAI base URL.

    Example: winnow serve --upstream-url https://host/v1 --best-of 8 --port 8000
    """
    flags = given(
        {
            "server": {"host": host, "port": port},
            "upstream": {"url": upstream_url, "key": upstream_key},
            "local": {"model": local_model},
            "reward": {"model": reward_model},
            "route": {"best_of": best_of, "min_reward": _number_or_percentile(min_reward), "on_reject": on_reject},
            "device": device,
            "dtype": dtype,
        },
    )
    run_server(Source(config, flags), lambda _, address: say(f"winnow serves {address}/v1"))


def run_server(source: Source, on_ready: Callable[[uvicorn.Server, str], None]) -> None:
    """Serves until a signal. `on_ready` is called once, when requests are answered, with the server and its address.

    SIGHUP reads the settings again. Raises `CommandError` when they are wrong, the port is taken or a model cannot be
    loaded.
    """
    settings = source.load()
    with listen(settings.server.host, settings.server.port) as listening:
        if settings.server.workers == 1:
            _run(settings, source, listening, on_ready)
            return
        supervise(
            settings.server.workers,
            lambda number: _run(settings, source, listening, on_ready if number == 0 else _say_nothing),
        )


def _say_nothing(server: uvicorn.Server, address: str) -> None:
    """One worker speaks for all."""


def _run(
    settings: Settings, source: Source, listening: socket.socket, on_ready: Callable[[uvicorn.Server, str], None]
) -> None:
    from proxy.logs import configure_logging
    from reward.errors import RewardError

    configure_logging(settings.log)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(settings, source, listening, on_ready))
    except KeyboardInterrupt:
        return  # The usual way to end a server: it has drained by now.
    except (RewardError, ValueError) as error:
        raise CommandError(str(error)) from error


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it exists (not on Windows): 5 to 16 % less CPU a request."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop


def listen(host: str, port: int) -> socket.socket:
    """Bound before anything slow is loaded. Raises `CommandError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise CommandError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
    except OSError as error:
        listening.close()
        hint = f"; is another server running there? Try --port {port + 1}" if port < 65535 else ""
        raise CommandError(f"cannot listen on {host}:{port}: {error.strerror}{hint}") from error
    return listening


async def _serve(
    settings: Settings, source: Source, listening: socket.socket, on_ready: Callable[[uvicorn.Server, str], None]
) -> None:
    from prometheus_client import CollectorRegistry

    from proxy.app import create_app
    from proxy.server import Server
    from reward.metrics import ScoreMetrics

    registry = CollectorRegistry()
    metrics = ScoreMetrics(registry)
    made = make_parts(settings, metrics, scores_only=source.scores_only)
    app = create_app(settings, made.parts, registry, __version__, scores_only=source.scores_only)
    server = Server(app.asgi, app.gate)
    # The lifespan is entered here, so that a model that cannot be loaded is one line and not a traceback.
    async with contextlib.AsyncExitStack() as opened:
        if made.tracing is not None:
            opened.callback(made.tracing.close)
        with progress_console().status("Loading models …"):
            await opened.enter_async_context(app.asgi.router.lifespan_context(app.asgi))
        await opened.enter_async_context(reloading(app, source, made, metrics))
        _spare_collector()
        # The socket listens before the server starts: whoever is told now and asks at once waits in its backlog.
        listening.listen(_BACKLOG)
        on_ready(server, _address(listening))
        await server.serve(sockets=[listening])


def _spare_collector() -> None:
    """What is loaded now stays, and requests free themselves by counting: both need the collector less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, 20, 20)


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags that were not given must not hide the environment and the file."""
    kept = {}
    for name, value in flags.items():
        own = given(value) if isinstance(value, dict) else value
        if own is not None and own != {}:
            kept[name] = own
    return kept


def _number_or_percentile(value: str | None) -> float | str | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return value
