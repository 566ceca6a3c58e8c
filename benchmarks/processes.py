"""Servers in processes of their own on free loopback ports, and the CPU time they have used."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import psutil
import uvicorn

_START_S = 60
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120


@dataclass(frozen=True, slots=True)
class Server:
    """A running server process."""

    name: str
    base_url: str
    """Ends with `/v1`."""
    pid: int

    def cpu_s(self) -> float:
        """Seconds of CPU that the process, its threads and its children have used so far."""
        process = psutil.Process(self.pid)
        return sum(_cpu_s(one) for one in (process, *process.children(recursive=True)))

    def rss_mb(self) -> float:
        """Memory of the process that is in RAM."""
        return float(psutil.Process(self.pid).memory_info().rss) / 2**20


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextlib.contextmanager
def started(name: str, arguments: list[str], environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Runs `python ARGUMENTS` until the block ends. The process names its address on stderr once it listens.

    Raises `RuntimeError` with all it said when it does not.
    """
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        env=clean_environment() | dict(environment or {}),
    )
    assert process.stderr is not None
    guard = threading.Timer(_START_S, process.kill)
    guard.start()
    # A pipe that nobody reads fills up, and stops the server in the middle of a log line.
    drain = threading.Thread(target=_drain, args=(process.stderr,), daemon=True)
    said = ""
    try:
        for line in process.stderr:
            said += line
            if match := re.search(r"http://\S+?/v1", line):
                guard.cancel()
                drain.start()
                yield Server(name, match[0], process.pid)
                return
        raise RuntimeError(f"{name} did not start: {said}")
    finally:
        guard.cancel()
        process.kill()
        process.wait()
        if drain.ident is not None:
            drain.join()
        process.stderr.close()


def clean_environment() -> dict[str, str]:
    """Without settings of winnow: those of whoever runs this would change what is measured."""
    return {key: value for key, value in os.environ.items() if not key.startswith("WINNOW_")}


def _drain(stream: IO[str]) -> None:
    while stream.read(65536):
        pass


def serve_until_told(app: Any) -> None:
    """Serves on a free port of 127.0.0.1 as `winnow serve` does (uvicorn, warnings only), until killed."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    config = uvicorn.Config(app, log_level="warning", server_header=False, proxy_headers=False)
    print(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", file=sys.stderr, flush=True)
    uvicorn.Server(config).run(sockets=[listening])
