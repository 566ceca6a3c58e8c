"""The services by name: where they are, which variable holds the key, what they take."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from training.hosted.options import HostedOptions, ProviderName
from training.hosted.providers import Provider, Rules
from training.hosted.transport import Calls
from training.options import OptionsError

_MIB = 1024 * 1024
_GIB = 1024 * _MIB


@dataclass(frozen=True, slots=True)
class Service:
    """What is known of a service without asking it."""

    rules: Rules
    url: str | None
    """Its own address; None where every customer has another."""
    key_variable: str
    notice: str | None = None
    """What whoever starts a job there should know."""


OPENAI_NOTICE = (
    "OpenAI is closing self-serve fine-tuning: organisations without recent use cannot create jobs any more, nobody "
    "can from 6 January 2027, and tuned models end with their bases. Best-of-N with a reward model keeps working "
    "with any hosted model: `winnow serve --upstream-url`."
)

SERVICES: Mapping[ProviderName, Service] = {
    "openai": Service(
        Rules(
            methods=frozenset({"sft", "dpo"}),
            takes=frozenset({"suffix", "seed", "learning_rate_multiplier", "beta"}),
            min_rows=10,
            max_file_bytes=512 * _MIB,
            weights=True,
        ),
        "https://api.openai.com/v1",
        "OPENAI_API_KEY",
        OPENAI_NOTICE,
    ),
    "azure": Service(
        Rules(
            methods=frozenset({"sft", "dpo"}),
            takes=frozenset({"suffix", "seed", "learning_rate_multiplier", "beta"}),
            min_rows=10,
            max_file_bytes=512 * _MIB,
            weights=True,
            several_outputs=True,
        ),
        None,
        "AZURE_OPENAI_API_KEY",
    ),
    "together": Service(
        Rules(
            methods=frozenset({"sft", "dpo"}),
            takes=frozenset({"suffix", "seed", "learning_rate", "beta", "lora_rank"}),
            min_rows=1,
            max_file_bytes=100 * _GIB,
            weights=True,
            alternating=True,
            max_suffix=40,
        ),
        "https://api.together.xyz/v1",
        "TOGETHER_API_KEY",
    ),
    "fireworks": Service(
        Rules(
            methods=frozenset({"sft", "dpo"}),
            takes=frozenset({"suffix", "learning_rate", "beta", "lora_rank"}),
            min_rows=3,
            max_rows=3_000_000,
            # Larger ones need a signed URL at another host.
            max_file_bytes=150 * _MIB,
            weights=True,
            dpo_validation=False,
            # Of an id of 63 characters, 24 are the run's.
            max_suffix=39,
        ),
        "https://api.fireworks.ai/v1",
        "FIREWORKS_API_KEY",
    ),
    "nebius": Service(
        Rules(
            methods=frozenset({"sft"}),
            takes=frozenset({"suffix", "seed", "learning_rate", "lora_rank"}),
            min_rows=1,
            max_file_bytes=5 * _GIB,
        ),
        "https://api.tokenfactory.nebius.com/v1",
        "NEBIUS_API_KEY",
    ),
}


def check_options(options: HostedOptions) -> Service:
    """The service of these settings. Raises `OptionsError` for one that it does not take, or that it needs."""
    service = SERVICES[options.provider]
    rules = service.rules
    if options.method not in rules.methods:
        raise OptionsError(f"method: {options.provider} offers no {options.method}")
    for name in ("suffix", "seed", "learning_rate", "learning_rate_multiplier", "beta", "lora_rank"):
        if getattr(options, name) is not None and name not in rules.takes:
            raise OptionsError(f"{name}: {options.provider} takes none")
    if options.beta is not None and options.method != "dpo":
        raise OptionsError("beta: is a setting of method: dpo")
    if options.suffix is not None and len(options.suffix) > rules.max_suffix:
        raise OptionsError(f"suffix: {options.provider} takes at most {rules.max_suffix} characters")
    if options.validation and options.method == "dpo" and not rules.dpo_validation:
        raise OptionsError(f"validation: {options.provider} takes none for dpo")
    if options.base_url is None and service.url is None:
        raise OptionsError(f"base_url: {options.provider} has none of its own; every customer's is another")
    if options.provider == "fireworks" and options.account is None:
        raise OptionsError("account: fireworks needs the account's id")
    if options.max_dollars is not None and options.dollars_per_million_tokens is None:
        raise OptionsError("max_dollars: needs dollars_per_million_tokens")
    return service


@contextmanager
def connect(options: HostedOptions) -> Iterator[Provider]:
    """The service, ready to be called while the block runs. Raises `OptionsError` without a key."""
    from training.hosted.fireworks import Fireworks
    from training.hosted.openai_shape import OpenAIShape
    from training.hosted.together import Together

    service = check_options(options)
    variable = options.key_variable or service.key_variable
    key = os.environ.get(variable)
    if not key:
        raise OptionsError(f"the environment variable {variable} is not set: it holds the key of {options.provider}")
    url = options.base_url or service.url
    assert url is not None, "check_options saw to it"
    with Calls.to(url, key, options) as calls:
        if options.provider == "together":
            yield Together(calls)
        elif options.provider == "fireworks":
            yield Fireworks(calls, options)
        else:
            yield OpenAIShape(calls, options)
