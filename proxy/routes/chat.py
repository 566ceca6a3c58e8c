"""`POST /v1/chat/completions`."""

from __future__ import annotations

from proxy.gateway import Gateway
from proxy.routes.generation import GenerationEndpoint

PATH = "/v1/chat/completions"


def chat(gateway: Gateway) -> GenerationEndpoint:
    return GenerationEndpoint(gateway, "chat")
