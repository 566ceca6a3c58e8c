"""The settings of hosted fine-tuning: `winnow hosted`, from `prepare` to the finished job."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from training.options import Options

ProviderName = Literal["openai", "azure", "together", "fireworks", "nebius"]
HostedMethod = Literal["sft", "dpo"]


class HostedOptions(Options):
    """`winnow hosted`. What is left unset is the provider's to decide."""

    provider: ProviderName
    """Whose fine-tuning service. `nebius` is any service of OpenAI's older shape, with `base_url`."""
    method: HostedMethod = "sft"
    """`sft`: learn from demonstrations; `dpo`: from preferences and rankings."""
    model: str = Field(min_length=1)
    """The base model, by the provider's name for it."""
    train: list[str] = Field(min_length=1)
    """Files of demonstrations, or of preferences and rankings (JSONL, .jsonl.gz, Parquet)."""
    validation: list[str] = Field(default=[])
    """Held-out files, on which the provider reports a loss. No prompt may stand in both."""
    skip_invalid: bool = False
    """Count and report bad and repeated records instead of stopping at the first."""
    output: str
    """Folder for the files that are uploaded, and for the record of what was sent and created."""

    pairs: Literal["all", "best_worst"] = "all"
    """Of a ranking: every pair that is not tied, or only the best against the worst, which costs less."""
    every_turn: bool = False
    """For `sft`: learn from the assistant's turns in the prompt too, not from the completion only."""
    epochs: int | None = Field(default=None, ge=1, le=50)
    """Passes over the data."""
    batch_size: int | None = Field(default=None, ge=1)
    """Records a step."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak; for `together`, `fireworks` and `nebius`."""
    learning_rate_multiplier: float | None = Field(default=None, gt=0)
    """Times the provider's own rate; for `openai` and `azure`."""
    beta: float | None = Field(default=None, gt=0, le=2)
    """DPO's: how dear it is to leave the base model's behaviour."""
    lora_rank: int | None = Field(default=None, ge=1)
    """Rank of the adapters; for `together`, `fireworks` and `nebius`."""
    suffix: str | None = Field(default=None, pattern=r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$")
    """Becomes a part of the tuned model's name: lower case, digits, hyphens."""
    seed: int | None = Field(default=None, ge=0, le=2**31 - 1)
    """Of the provider's training; `fireworks` takes none."""

    base_url: str | None = Field(default=None, pattern=r"^https?://[^/\s]+")
    """The service's address, with its version; None takes the provider's own. Required for `azure`:
    `https://RESOURCE.openai.azure.com/openai/v1`."""
    account: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]+$")
    """The account's id; required for `fireworks`, which has it in its paths."""
    key_variable: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """The environment variable that holds the key; None takes the provider's usual one, such as OPENAI_API_KEY."""

    tokenizer: str | None = None
    """Folder, hub id or `package:NAME` of a tokenizer to count tokens with (`winnow[reward]`); None estimates."""
    bytes_per_token: float = Field(default=4.0, gt=0)
    """The estimate: UTF-8 bytes of text to a token."""
    dollars_per_million_tokens: float | None = Field(default=None, ge=0)
    """What the provider asks for a million trained tokens; with it, `prepare` says what a job costs."""
    max_dollars: float | None = Field(default=None, ge=0)
    """Refuse to prepare a job whose estimated cost is higher. Needs `dollars_per_million_tokens`."""

    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds for one call to the provider, an upload included."""
    max_tries: int = Field(default=6, ge=1)
    """Tries of a call that fails in a way that may pass."""
    file_timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds in which the provider must have processed an uploaded file."""
    poll_s: float = Field(default=10.0, gt=0)
    """Seconds between two looks at a file or a job."""

    @field_validator("base_url")
    @classmethod
    def _keeps_keys(cls, url: str | None) -> str | None:
        """The key goes with every call: in clear text only to this machine."""
        if url is None:
            return None
        parts = urlsplit(url)
        host = parts.hostname or ""
        if parts.scheme == "http" and not (host in ("localhost", "::1") or host.startswith("127.")):
            raise ValueError("would send the key unencrypted: use https")
        return url.rstrip("/")
