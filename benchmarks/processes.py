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
from typing import Any

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
        """Seconds of CPU that the process and its threads have used so far."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def started(name: str, arguments: list[str], environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Runs `python ARGUMENTS` until the block ends. The process names its address on stderr once it listens.

    Raises `RuntimeError` with all it said when it does not.
    """
    # Settings in the environment of whoever runs this would change what is measured.
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WINNOW_")}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        env=clean | dict(environment or {}),
    )
    assert process.stderr is not None
    guard = threading.Timer(_START_S, process.kill)
    guard.start()
    said = ""
    try:
        for line in process.stderr:
            said += line
            if match := re.search(r"http://\S+?/v1", line):
                guard.cancel()
                yield Server(name, match[0], process.pid)
                return
        raise RuntimeError(f"{name} did not start: {said}")
    finally:
        guard.cancel()
        process.kill()
        process.wait()
        process.stderr.close()


def serve_until_told(app: Any) -> None:
    """Serves on a free port of 127.0.0.1 as `winnow serve` does (uvicorn, warnings only), until killed."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    config = uvicorn.Config(app, log_level="warning", server_header=False, proxy_headers=False)
    print(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", file=sys.stderr, flush=True)
    uvicorn.Server(config).run(sockets=[listening])
