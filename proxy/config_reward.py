"""Settings of a reward model, in this process or elsewhere."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from proxy.config_operations import Section, at_commas
from reward.dialects import DialectName
from reward.manifest import Aggregate
from reward.shared_prefix import CACHE_TOKENS, SharingMode

Percentile = Annotated[str, Field(pattern=r"^p(100|[0-9]{1,2}(\.[0-9]+)?)$")]
RewardFloor = Annotated[float, Field(allow_inf_nan=False)] | Percentile


class RewardSettings(Section):
    """The reward model."""

    model: str = "default"
    """A folder, a hub id, `default` for the shipped one, or `none`: nothing is scored. With `url`, its name there."""
    url: str | None = Field(default=None, pattern=r"^https?://[^/]+")
    """Address of a service that scores, in place of a model in this process: `http://gpu:8001/v1`."""
    replicas: tuple[str, ...] = ()
    """More addresses of the same service: the least busy is asked, and the next when it fails."""
    protocol: DialectName = "winnow"
    """What the service speaks. `openrlhf` needs its whole address in `url`, and a `template`."""
    key: SecretStr | None = None
    """Sent to the service as a bearer token."""
    template: str | None = None
    """For services that take text: file with the reward model's chat template (Jinja)."""
    mean: float = Field(default=0.0, allow_inf_nan=False)
    """Of raw rewards, where the service does not normalise: they are shifted by it."""
    std: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """And divided by this."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Seconds for one request to the service, all replicas tried: each that is silent gets an even share of what is
    left."""
    connect_timeout_s: float = Field(default=2.0, gt=0)
    """Seconds to get a connection to a replica."""
    max_batch_tokens: int | None = Field(default=None, ge=1)
    """Padded tokens in one forward pass (longest × count), a prompt that completions share not counted; unset, 1024 on
    a CPU and 16384 on a GPU."""
    max_batch_size: int = Field(default=64, ge=1)
    """Completions in one forward pass."""
    max_padding: float | None = Field(default=None, ge=0, le=1)
    """Most of a batch that may be padding, as a share; unset, a tenth on a CPU and any on a GPU."""
    devices: Annotated[tuple[str, ...], NoDecode] = ()
    """Devices that each get a copy of the model: `[cuda:0, cuda:1]`, or `[all]` for every GPU that the process sees;
    `[all, cpu]` for the CPU besides. A batch goes to one that is free. Unset: one copy, on `device`. In the
    environment: comma-separated."""
    compile: bool = False
    """Compile the model's layers by `torch.compile` when it is loaded: that takes a minute or so, and needs a C++
    compiler on a CPU, Triton on a GPU."""
    aggregate: Aggregate | None = None
    """Of a reward model in this process that has several heads: `mean`, `worst` (the lowest) or `mean_less_std` of
    their rewards; unset, as the model says itself."""
    floors: dict[str, RewardFloor] | None = None
    """Of a reward model in this process with several objectives: the least reward for an objective, or a percentile of
    its references. Whatever misses one stands below all that miss none. Unset, as the model says itself."""
    objective_weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    """The same: what counts how much in the mean that is wanted high."""
    shared_prefix: SharingMode = "auto"
    """`auto`: the prompt is encoded once for all completions of a request, where the model allows it and it pays.
    `off`: every completion is scored with a prompt of its own."""
    prefix_cache_tokens: int = Field(default=CACHE_TOKENS, ge=0)
    """Tokens of the latest prompts that a model keeps encoded, for later batches and requests that begin the same. 0:
    none. Each token takes 2 × layers × key and value heads × head width numbers."""
    max_queue: int = Field(default=1024, ge=1)
    """Completions waiting to be scored; with more, `on_reward_failure` decides, and `/v1/score` answers 429."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    @field_validator("devices", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return at_commas(value)
