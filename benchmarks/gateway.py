"""What the proxy costs: winnow beside the least that a Python proxy can cost, and beside other gateways, in one run.

All servers are processes on loopback. CPU is that of the proxy's process alone, a request. The last table holds what
was found against the bars that winnow has set itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace

import aiohttp

from benchmarks import bars, peers
from benchmarks.load import Load, Samples, Target, cpu_ms, latency_ms, median_ratio, requests_per_s
from benchmarks.processes import Server, started
from benchmarks.tables import Table

ROUNDS = 4
_PLAIN_WAIT_MS = 50
_BEST_OF_WAIT_MS = 200
_CLIENTS = 16
_STREAM_SHARE = 0.25
"""A peer that builds every chunk anew costs fifty times the floor there."""


@dataclass(frozen=True, slots=True)
class Servers:
    upstream: Server
    floor: Server
    winnow: Server
    parallel: Server
    """winnow that never asks for `n`, as for an upstream that does not take it."""
    litellm: Server | None
    its_hub: Server | None


def run(rounds: int = ROUNDS, share: float = 1.0, *, with_peers: bool = True) -> list[Table]:
    """Some minutes, and some more where the peers are not installed yet. `share`: of the usual number of requests.

    Raises `RuntimeError` when a server of ours does not start or an answer is not what was asked for.
    """
    with _servers(with_peers) as servers:
        return asyncio.run(_measure(servers, rounds, share))


@contextlib.contextmanager
def _servers(with_peers: bool) -> Iterator[Servers]:
    with contextlib.ExitStack() as running:
        upstream = running.enter_context(started("upstream", ["-m", "benchmarks.upstream"]))
        floor = running.enter_context(started("floor", ["-m", "benchmarks.floor", upstream.base_url]))
        winnow = running.enter_context(winnow_before(upstream))
        parallel = running.enter_context(winnow_before(upstream, WINNOW_UPSTREAM_N_MODE="parallel"))
        litellm = running.enter_context(peers.litellm(upstream.base_url)) if with_peers else None
        its_hub = running.enter_context(peers.its_hub(upstream.base_url)) if with_peers else None
        yield Servers(upstream, floor, winnow, parallel, litellm, its_hub)


def winnow_before(upstream: Server, **environment: str) -> contextlib.AbstractContextManager[Server]:
    """The server as users start it, without a reward model."""
    serve = ["-m", "winnow", "serve", "--port", "0", "--reward-model", "none", "--best-of", "1"]
    return started("winnow", [*serve, "--upstream-url", upstream.base_url], environment)


async def _measure(servers: Servers, rounds: int, share: float) -> list[Table]:
    tables: list[Table] = []
    found: list[bars.Bar] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for part in (_plain, _best_of, _at_once):
            more, held = await part(session, servers, rounds, share)
            tables += more
            found += held
    return [*tables, bars.table(found)]


Part = tuple[list[Table], list[bars.Bar]]


async def _plain(session: aiohttp.ClientSession, servers: Servers, rounds: int, share: float) -> Part:
    """`best_of: 1`: one call, nothing to choose."""
    floor, winnow = Target("floor", servers.floor), Target("winnow, best_of 1", servers.winnow)
    targets = [floor, winnow]
    if servers.its_hub is not None:
        targets.append(Target(f"{servers.its_hub.name}, budget 1", servers.its_hub, share=0.25))
    if servers.litellm is not None:
        targets.append(Target(servers.litellm.name, servers.litellm, share=0.05))
    cpu = await cpu_ms(session, targets, Load(_scaled(1000, share)), rounds)
    slower = [replace(target, share=target.share * _STREAM_SHARE if target.share < 1 else 1) for target in targets]
    streams = await cpu_ms(session, slower, Load(_scaled(400, share), stream=True), rounds)
    direct = Target("direct", servers.upstream)
    latency = await latency_ms(session, [direct, *targets], _PLAIN_WAIT_MS, _scaled(25 * rounds, share))
    tables = [
        _cpu_table("A plain request", cpu),
        _cpu_table("A stream of 64 tokens", streams),
        _latency_table("A plain request", latency, _PLAIN_WAIT_MS),
    ]
    held = [
        bars.Bar("plain request, CPU ÷ floor", 2, _ratio(cpu, winnow, floor)),
        bars.Bar("stream, CPU ÷ floor", 2, _ratio(streams, winnow, floor)),
        bars.Bar(f"plain request, p50 added over {_PLAIN_WAIT_MS} ms", 2, _added_ms(latency, winnow, direct), " ms"),
    ]
    return tables, held


async def _best_of(session: aiohttp.ClientSession, servers: Servers, rounds: int, share: float) -> Part:
    """N candidates unscored, by N calls and by one call with `n`."""
    tables: list[Table] = []
    held: list[bars.Bar] = []
    for n, requests in ((4, 400), (16, 300)):
        floor, winnow = _by_calls(servers, n)
        cpu = await cpu_ms(session, [floor, winnow, *_its_hub(servers, n)], Load(_scaled(requests, share)), rounds)
        tables.append(_cpu_table(f"{n} candidates, {n} upstream calls", cpu))
        if n == 16:
            held.append(bars.Bar("16 candidates by 16 calls, CPU ÷ floor", 2, _ratio(cpu, winnow, floor)))
        floor_choices = Target(f"floor, n={n}", servers.floor, headers={"x-floor-choices": str(n)})
        winnow_choices = Target(f"winnow, best_of {n} by n={n}", servers.winnow, {"best_of": n})
        cpu = await cpu_ms(session, [floor_choices, winnow_choices], Load(_scaled(600, share)), rounds)
        tables.append(_cpu_table(f"{n} candidates, one upstream call", cpu))
    return tables, held


async def _at_once(session: aiohttp.ClientSession, servers: Servers, rounds: int, share: float) -> Part:
    """16 candidates from an upstream that takes its time: alone, and 16 clients at once."""
    floor, winnow = _by_calls(servers, 16)
    targets = [floor, winnow, *_its_hub(servers, 16)]
    direct = Target("direct", servers.upstream)
    latency = await latency_ms(session, [direct, *targets], _BEST_OF_WAIT_MS, _scaled(8 * rounds, share))
    load = Load(_scaled(20 * _CLIENTS, share), _CLIENTS, _BEST_OF_WAIT_MS)
    rates: Samples = {}
    peaks: dict[str, int] = {}
    for target in targets:
        await _peak(session, servers.upstream)
        rates |= await requests_per_s(session, [target], load, max(1, rounds - 1))
        peaks[target.name] = await _peak(session, servers.upstream)
    rows: list[list[str | float | None]] = [
        [name, statistics.median(values), peaks[name]] for name, values in rates.items()
    ]
    title = f"16 candidates by 16 calls, {_CLIENTS} clients at once, upstream answers after {_BEST_OF_WAIT_MS} ms"
    tables = [
        _latency_table("16 candidates by 16 calls", latency, _BEST_OF_WAIT_MS),
        Table(title, ["target", "requests a second", "most upstream calls at once"], rows),
    ]
    p50 = statistics.median(latency[winnow.name])
    held = [
        bars.Bar(f"16 candidates by 16 calls, p50 over {_BEST_OF_WAIT_MS} ms", 230, p50, " ms"),
        bars.Bar(
            f"the same, {_CLIENTS} clients", 50, statistics.median(rates[winnow.name]), " a second", at_least=True
        ),
        bars.Bar("the same, upstream calls at once", 16 * _CLIENTS, peaks[winnow.name], at_least=True),
    ]
    return tables, held


def _by_calls(servers: Servers, n: int) -> tuple[Target, Target]:
    floor = Target(f"floor, {n} calls", servers.floor, headers={"x-floor-calls": str(n)})
    return floor, Target(f"winnow, best_of {n}", servers.parallel, {"best_of": n})


def _its_hub(servers: Servers, n: int) -> list[Target]:
    if servers.its_hub is None:
        return []
    return [
        Target(f"{servers.its_hub.name}, budget {n}", servers.its_hub, headers={"x-its-budget": str(n)}, share=0.25)
    ]


async def _peak(session: aiohttp.ClientSession, upstream: Server) -> int:
    async with session.get(f"{upstream.base_url}/peak") as answer:
        return int(await answer.read())


def _scaled(requests: int, share: float) -> int:
    return max(1, round(requests * share))


def _cpu_table(what: str, cpu: Samples) -> Table:
    floor = next(iter(cpu))
    rows: list[list[str | float | None]] = [
        [name, statistics.median(values), median_ratio(values, cpu[floor])] for name, values in cpu.items()
    ]
    return Table(f"{what}: CPU of the proxy process, 8 at once", ["target", "CPU ms a request", f"÷ {floor}"], rows)


def _latency_table(what: str, latency: Samples, wait_ms: int) -> Table:
    """The first is the direct call: the difference to it is the proxy's."""
    direct = statistics.median(next(iter(latency.values())))
    rows: list[list[str | float | None]] = [
        [name, statistics.median(values), statistics.median(values) - direct] for name, values in latency.items()
    ]
    title = f"{what}, one at a time, upstream answers after {wait_ms} ms"
    return Table(title, ["target", "p50 ms", "added p50 ms"], rows)


def _ratio(samples: Samples, target: Target, to: Target) -> float | None:
    return median_ratio(samples[target.name], samples[to.name])


def _added_ms(latency: Samples, target: Target, direct: Target) -> float:
    return statistics.median(latency[target.name]) - statistics.median(latency[direct.name])
