"""One configuration at work, handed to every request. Nothing of a request is ever written to it.

A reload makes a new one: a request keeps the gateway it came in by until its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from proxy.admission import Admission
from proxy.config import Settings
from proxy.errors import BadRequestError
from proxy.headers import to_upstream
from proxy.joining import Joining
from proxy.keys import KeyRing
from proxy.ledger import Price
from proxy.metrics import ProxyMetrics
from proxy.origins import PageGuard
from proxy.recorder import Recorder
from proxy.routing import Route, RoutingTable
from proxy.strategies.history import Histories
from proxy.upstreams.base import Upstream
from reward.scorer import Scorer


@dataclass(frozen=True, slots=True)
class Gateway:
    settings: Settings
    routing: RoutingTable
    upstreams: Mapping[str, Upstream]
    scorers: Mapping[str, Scorer]
    """By their names in the configuration."""
    admission: Admission
    metrics: ProxyMetrics
    keys: KeyRing
    page_guard: PageGuard | None
    joining: Joining
    forward_headers: frozenset[str]
    """Request headers, in lower case, that one upstream or another gets besides the usual ones."""
    prices: Mapping[str, Price]
    """By the names that upstreams are asked for."""
    recorder: Recorder | None
    """None: no candidates are kept."""
    histories: Histories
    """What rewards look like on each route: sums over many requests, in which none can be told apart."""

    def scorer(self, name: str | None, param: str, otherwise: Scorer | None) -> Scorer | None:
        """The named scorer, or `otherwise`. Raises `BadRequestError`."""
        if name is None:
            return otherwise
        # By the name that answers give, which a model may only know once it is loaded, or by the configured one.
        by_name = {scorer.name: scorer for scorer in self.scorers.values()}
        found = by_name.get(name) or self.scorers.get(name)
        if found is None:
            known = ", ".join(sorted(by_name)) or "none"
            raise BadRequestError(f"No reward model {name!r} here; there is: {known}", param=param)
        return found

    def forwarded(self, headers: Mapping[str, str], route: Route) -> dict[str, str]:
        """The client's headers for the route's upstream."""
        return to_upstream(headers, route.forward_headers, keep_credentials=not self.keys.guards)
