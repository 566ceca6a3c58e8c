"""Requests to a scoring service elsewhere: over one of its replicas, and over the next when that one fails."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from proxy.config import UpstreamSettings
from proxy.config_reward import RewardSettings
from proxy.upstreams.base import Upstream, UpstreamCall, UpstreamError, UpstreamResponse
from proxy.upstreams.circuit import Circuit, CircuitPolicy
from proxy.upstreams.hosted import HostedUpstream
from proxy.upstreams.retries import retry_after_s
from reward.errors import InputError, QueueFullError, ScoringError, UnreachableError

_HEADERS = {"content-type": "application/json", "accept": "application/json"}
_CIRCUIT = CircuitPolicy(failure_ratio=0.5, min_calls=5, window_s=10.0, open_s=5.0)
"""A replica that mostly fails is passed over for a while. Short: scoring is quick, and so is knowing better."""
_SHOWN_CHARS = 200


@dataclass(slots=True)
class _Replica:
    upstream: Upstream
    circuit: Circuit
    num_running: int = 0


class ReplicatedTransport:
    """`reward.remote.Transport` over HTTP. The replica with the fewest requests under way is asked first."""

    def __init__(self, name: str, settings: RewardSettings) -> None:
        self._name = name
        self._timeout_s = settings.timeout_s
        addresses = [settings.url, *settings.replicas]
        self._replicas = [
            _Replica(HostedUpstream(_upstream_settings(settings, address)), Circuit(_CIRCUIT, time.monotonic))
            for address in addresses
            if address is not None
        ]

    async def open(self) -> None:
        for replica in self._replicas:
            await replica.upstream.open()

    async def post(self, path: str, body: bytes) -> bytes:
        failure: UnreachableError | QueueFullError | None = None
        time_now = asyncio.get_running_loop().time
        ends_at = time_now() + self._timeout_s
        replicas = self._in_turn()
        for position, replica in enumerate(replicas):
            # One that is silent must leave time for the others.
            allowed_s = (ends_at - time_now()) / (len(replicas) - position)
            try:
                return await self._post(replica, path, body, allowed_s)
            except (UnreachableError, QueueFullError) as error:
                failure = error
        raise failure or UnreachableError(f"every replica of {self._name} keeps failing and is left alone for a moment")

    async def aclose(self) -> None:
        for replica in self._replicas:
            await replica.upstream.aclose()

    def _in_turn(self) -> list[_Replica]:
        return sorted(self._replicas, key=lambda replica: replica.num_running)

    async def _post(self, replica: _Replica, path: str, body: bytes, allowed_s: float) -> bytes:
        ticket = replica.circuit.admit()
        if ticket is None:
            raise UnreachableError(f"a replica of {self._name} keeps failing and is left alone for a moment")
        replica.num_running += 1
        failed: bool | None = None
        try:
            async with asyncio.timeout(allowed_s):
                response = await replica.upstream.send(UpstreamCall("POST", path, body, _HEADERS))
                try:
                    answer = await response.read()
                finally:
                    await response.aclose()
            failed = response.status >= 500
        except TimeoutError as error:
            failed = True
            raise UnreachableError(f"{self._name} did not answer within {allowed_s:.3g} s") from error
        except UpstreamError as error:
            failed = error.reason != "authentication"
            if not failed:
                raise ScoringError(f"{self._name} refuses the key it is sent (reward.key)") from error
            raise UnreachableError(f"{self._name}: {error}") from error
        finally:
            replica.num_running -= 1
            if failed is None:
                replica.circuit.forget(ticket)
            else:
                replica.circuit.record(ticket, failed=failed)
        return self._accepted(response, answer)

    def _accepted(self, response: UpstreamResponse, answer: bytes) -> bytes:
        """Raises what the status means."""
        status = response.status
        if status == 200:
            return answer
        said = f"{self._name} answered {status}: {answer[:_SHOWN_CHARS].decode('utf-8', 'replace')}"
        if status == 429:
            headers = {name.lower(): value for name, value in response.headers.items()}
            raise QueueFullError(said, retry_after_s(headers) or 1.0)
        if status >= 500:
            raise UnreachableError(said)
        if status in (400, 413, 422):
            raise InputError(said)
        raise ScoringError(said)


def _upstream_settings(settings: RewardSettings, url: str) -> UpstreamSettings:
    return UpstreamSettings(
        name="reward",
        url=url,
        key=settings.key,
        connect_timeout_s=settings.connect_timeout_s,
        first_byte_timeout_s=settings.timeout_s,
    )
