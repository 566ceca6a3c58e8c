"""What the proxy costs: winnow beside the least that a Python proxy can cost, in one run on one machine.

All servers are processes on loopback. CPU is that of the proxy's process alone. Every round asks all targets in
turn, so that a busy moment of the machine hits them alike; the tables show medians over rounds, as ratios.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import orjson

from benchmarks.processes import Server, started
from benchmarks.tables import Table

ROUNDS = 4
_WAIT_MS = 50
_QUESTION = [
    {"role": "system", "content": "You answer briefly and correctly."},
    {"role": "user", "content": "Why is the sky blue, and why is it red in the evening? Explain it to a child of ten."},
]


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how one kind of request is sent."""

    name: str
    server: Server
    fields: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self, wait_ms: int, **more: Any) -> bytes:
        base = {"model": f"wait-{wait_ms}", "messages": _QUESTION, "temperature": 0.7}
        return orjson.dumps(base | dict(self.fields) | more)


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of one kind, compared over targets; the first is what the others are divided by."""

    title: str
    targets: Sequence[Target]
    requests: int
    """A round and target."""
    concurrency: int = 8
    stream: bool = False


def run(rounds: int = ROUNDS, share: float = 1.0) -> list[Table]:
    """About a minute. `share`: of the usual number of requests.

    Raises `RuntimeError` when a server does not start or an answer is not what was asked for.
    """
    with _servers() as servers:
        return asyncio.run(_measure(*servers, rounds, share))


@contextlib.contextmanager
def _servers() -> Iterator[tuple[Server, Server, Server, Server]]:
    with contextlib.ExitStack() as running:
        upstream = running.enter_context(started("upstream", ["-m", "benchmarks.upstream"]))
        floor = running.enter_context(started("floor", ["-m", "benchmarks.floor", upstream.base_url]))
        serve = ["-m", "winnow", "serve", "--port", "0", "--reward-model", "none", "--best-of", "1"]
        serve += ["--upstream-url", upstream.base_url]
        winnow = running.enter_context(started("winnow", serve))
        parallel = running.enter_context(started("winnow", serve, {"WINNOW_UPSTREAM_N_MODE": "parallel"}))
        yield upstream, floor, winnow, parallel


async def _measure(
    upstream: Server, floor: Server, winnow: Server, parallel: Server, rounds: int, share: float
) -> list[Table]:
    plain = [Target("floor", floor), Target("winnow, best_of 1", winnow)]
    workloads = [
        Workload("Plain request", plain, 1000),
        Workload("Stream of 64 tokens", plain, 500, stream=True),
    ]
    for n, requests in ((4, 400), (16, 150)):
        calls = [
            Target(f"floor, {n} calls", floor, headers={"x-floor-calls": str(n)}),
            Target(f"winnow, best_of {n}", parallel, {"best_of": n}),
        ]
        one_call = [
            Target(f"floor, n={n}", floor, {"n": n}),
            Target(f"winnow, best_of {n}", winnow, {"best_of": n}),
        ]
        workloads.append(Workload(f"{n} candidates unscored, {n} upstream calls", calls, requests))
        workloads.append(Workload(f"{n} candidates unscored, one upstream call", one_call, 800))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        shares = [replace(workload, requests=max(1, round(workload.requests * share))) for workload in workloads]
        tables = [await _cpu_table(session, workload, rounds) for workload in shares]
        tables.append(await _latency_table(session, [Target("direct", upstream), *plain], rounds))
        best_of = [
            Target("floor, 16 calls", floor, headers={"x-floor-calls": "16"}),
            Target("winnow, best_of 16, 16 calls", parallel, {"best_of": 16}),
        ]
        tables.append(await _latency_table(session, [Target("direct", upstream), *best_of], rounds))
    return tables


async def _cpu_table(session: aiohttp.ClientSession, workload: Workload, rounds: int) -> Table:
    cpu_ms: dict[str, list[float]] = {target.name: [] for target in workload.targets}
    for number in range(rounds + 1):
        for target in workload.targets:
            before = target.server.cpu_s()
            await _send_all(session, target, workload)
            # The first round warms connections and code.
            if number > 0:
                cpu_ms[target.name].append((target.server.cpu_s() - before) * 1000 / workload.requests)
    first = workload.targets[0].name
    rows: list[list[str | float | None]] = [
        [name, statistics.median(values), _median_ratio(values, cpu_ms[first])] for name, values in cpu_ms.items()
    ]
    title = f"{workload.title}: CPU of the proxy process, {workload.concurrency} requests at once"
    return Table(title, ["target", "CPU ms a request", f"ratio to {first}"], rows)


async def _latency_table(session: aiohttp.ClientSession, targets: Sequence[Target], rounds: int) -> Table:
    """One request at a time, the targets by turns: the difference is the proxy's."""
    seconds: dict[str, list[float]] = {target.name: [] for target in targets}
    for number in range(10 * rounds + 2):
        for target in targets:
            started_at = time.perf_counter()
            await _send(session, target, target.body(_WAIT_MS), stream=False)
            if number > 1:
                seconds[target.name].append(time.perf_counter() - started_at)
    direct = statistics.median(seconds[targets[0].name])
    added = {name: (statistics.median(values) - direct) * 1000 for name, values in seconds.items()}
    floor = targets[1].name
    # Under a tenth of a millisecond the floor's own share is noise, and a ratio to it says nothing.
    rows: list[list[str | float | None]] = [
        [name, direct * 1000 + ms, ms, ms / added[floor] if added[floor] > 0.1 else None] for name, ms in added.items()
    ]
    title = f"Latency, one request at a time, upstream answers after {_WAIT_MS} ms"
    return Table(title, ["target", "p50 ms", "added p50 ms", f"added, ratio to {floor}"], rows)


def _median_ratio(values: Sequence[float], to: Sequence[float]) -> float | None:
    """Round by round, so that a slow round does not favour either."""
    # Too few requests may cost less than the clock can tell.
    ratios = [value / other for value, other in zip(values, to, strict=True) if other > 0]
    return statistics.median(ratios) if ratios else None


async def _send_all(session: aiohttp.ClientSession, target: Target, workload: Workload) -> None:
    body = target.body(0, stream=True) if workload.stream else target.body(0)
    left = iter(range(workload.requests))

    async def client() -> None:
        for _ in left:
            await _send(session, target, body, stream=workload.stream)

    await asyncio.gather(*(client() for _ in range(workload.concurrency)))


async def _send(session: aiohttp.ClientSession, target: Target, body: bytes, *, stream: bool) -> None:
    headers = {"content-type": "application/json", "authorization": "Bearer none"} | dict(target.headers)
    async with session.post(f"{target.server.base_url}/chat/completions", data=body, headers=headers) as answer:
        raw = await answer.read()
    # A fast wrong answer would win every benchmark.
    if answer.status != 200 or (b"[DONE]" not in raw[-20:] if stream else b'"choices"' not in raw):
        raise RuntimeError(f"{target.name} answered {answer.status}: {raw[:200]!r}")
