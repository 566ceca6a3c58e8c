"""Fixtures that several rooms' tests share: a proxy over real HTTP, between a fake upstream and a fake scorer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import openai
import pytest
from prometheus_client import CollectorRegistry

from feedback.store import DatabaseStore
from proxy.app import Application, Parts, create_app
from proxy.config import Settings
from proxy.config_loading import load_settings
from proxy.upstreams.hosted import HostedUpstream
from tests.fakes.scorer import FakeScorer
from tests.fakes.serving import serving
from tests.fakes.upstream import FakeUpstream

# How long an example takes says more of the machine's load than of the code; every test has a time-out of its own.
hypothesis.settings.register_profile("winnow", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("winnow")


@dataclass
class RunningProxy:
    """A proxy that listens, with what lies before and behind it."""

    url: str
    upstream: FakeUpstream
    scorer: FakeScorer
    registry: CollectorRegistry
    client: openai.OpenAI
    """With no retries: a test wants to see the first answer."""
    app: Application

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


StartProxy = Callable[..., RunningProxy]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the person who runs the tests must not steer them."""
    for name in ("OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def start_proxy() -> Iterator[StartProxy]:
    """Starts proxies; keyword arguments are sections of the settings. All are stopped after the test."""
    with contextlib.ExitStack() as running:

        def start(**sections: dict[str, Any]) -> RunningProxy:
            upstream = FakeUpstream()
            upstream_url = running.enter_context(serving(upstream))
            running.callback(upstream.release)
            flags = dict(sections)
            flags["upstream"] = {"url": f"{upstream_url}/v1"} | flags.get("upstream", {})
            # Most tests want to see the first failure; those of retries say so.
            flags["route"] = {"max_retries": 0} | flags.get("route", {})
            settings = load_settings(flags=flags)
            scorer = FakeScorer()
            registry = CollectorRegistry()
            named = {name: HostedUpstream(settings.upstream_settings(name)) for name in settings.used_upstreams}
            app = create_app(settings, Parts(named, {"default": scorer}, _store(settings)), registry)
            url = running.enter_context(serving(app.asgi))
            client = running.enter_context(
                openai.OpenAI(base_url=f"{url}/v1", api_key="client-key", max_retries=0, timeout=30)
            )
            return RunningProxy(url, upstream, scorer, registry, client, app)

        yield start


def _store(settings: Settings) -> DatabaseStore | None:
    return DatabaseStore(settings.feedback.database.get_secret_value()) if settings.keeps_candidates else None


@pytest.fixture
def proxy(start_proxy: StartProxy) -> RunningProxy:
    return start_proxy()
