"""A tuned model as a route of the proxy: the YAML that `winnow serve` takes."""

from __future__ import annotations

from typing import Any

import yaml

from training.hosted.options import HostedOptions
from training.hosted.providers import JobStatus, Provider
from training.hosted.services import SERVICES


def route_yaml(options: HostedOptions, provider: Provider, status: JobStatus, route: str) -> str:
    """An upstream and a route to the tuned model. The key stays in its environment variable."""
    assert status.model is not None, "only of a job that has succeeded"
    variable = options.key_variable or SERVICES[options.provider].key_variable
    upstream = {"url": provider.serving_url, "key": f"${{{variable}}}"}
    snippet: dict[str, Any] = {
        "upstreams": {options.provider: upstream},
        "routes": {route: {"upstream": options.provider, "model": status.model}},
    }
    comment = f"# {options.model} tuned on {options.provider} by job {status.id} ({options.method})\n"
    return comment + yaml.safe_dump(snippet, sort_keys=False, allow_unicode=True)
