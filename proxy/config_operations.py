"""Settings of what runs beside the answers: prices, the feedback store, traces, logs. And what sections are made of."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class Section(BaseModel):
    """Settings that belong together."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def at_commas(value: object) -> object:
    """A list as the environment has it."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class PriceSettings(Section):
    """What a model costs."""

    prompt: float = Field(ge=0, allow_inf_nan=False)
    """US dollars for a million tokens of prompt."""
    completion: float = Field(ge=0, allow_inf_nan=False)
    """US dollars for a million tokens of completion."""
    cached_prompt: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """For prompt tokens that the upstream had in its cache; unset, as `prompt`."""


class FeedbackSettings(Section):
    """The store of candidate sets and of what people say of them. In use where a route has `log_candidates`."""

    database: SecretStr = SecretStr("sqlite:///winnow.db")
    """`sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/NAME` (needs `winnow[postgres]`)."""
    redact: bool = True
    """Replace e-mail addresses, telephone and card numbers, and keys by `[EMAIL]` … before anything is stored."""
    redact_patterns: dict[str, str] = {}
    """More to replace: `NAME: REGULAR EXPRESSION`. What matches becomes `[NAME]`."""
    max_queue: int = Field(default=1000, ge=1)
    """Candidate sets that may wait to be written; with more, new ones are dropped and counted."""
    max_queue_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)
    """What they may hold together, roughly."""
    max_batch: int = Field(default=100, ge=1)
    """Candidate sets written in one transaction."""
    retry_s: float = Field(default=30.0, ge=0)
    """Seconds that a write is tried again while the store fails; then its sets are dropped and counted."""
    flush_s: float = Field(default=10.0, ge=0)
    """Seconds that the end of the server leaves for writing what still waits."""


class TracingSettings(Section):
    """OpenTelemetry traces; needs `winnow[otel]`."""

    enabled: bool = False
    """Trace requests, upstream calls and scoring. Prompts and completions are in no trace."""
    endpoint: str | None = None
    """Where spans go, OTLP over HTTP: `http://127.0.0.1:4318/v1/traces`. Unset: as `OTEL_EXPORTER_OTLP_ENDPOINT`
    says."""
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of requests to trace; where a request comes with a trace of its own, that decides."""
    service_name: str = "winnow"
    """What this server is called in traces."""


class LogSettings(Section):
    """What goes to standard error."""

    format: Literal["text", "json"] = "text"
    """`json`: an object a line, for machines. Neither has bodies or keys."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level. `info` has one line a request, `debug` also probes and scrapes."""
