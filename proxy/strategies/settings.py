"""How candidates are drawn, as a route's settings say: part of `proxy.config.RouteSettings`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from proxy.config_operations import Section

StrategyName = Literal["best_of_n", "adaptive", "speculative"]


class StrategySettings(Section):
    """Drawing."""

    strategy: StrategyName = "best_of_n"
    """How candidates are drawn: all at once; in waves, until another is not expected to pay; or raced and pruned."""
    quorum: int | None = Field(default=None, ge=1)
    """Judge when this many valid candidates are there and cancel the rest; unset, wait for all. Slow answers are
    long answers: a quorum prefers short ones. Each candidate then takes an upstream call of its own."""
    straggler_factor: float = Field(default=4.0, ge=0)
    """Once half of the candidates are there, the others get this many times as long, then are cancelled; 0 waits on."""
    straggler_min_s: float = Field(default=10.0, ge=0)
    """Seconds that stragglers get at least, after half of the candidates are there."""
    straggler_learnt_factor: float = Field(default=1.5, ge=0)
    """Sooner than that, stragglers are cancelled that take this many times as long as 95 in 100 answers of the route
    did, once 32 are known; but not before they have taken twice as long as the ones that are there, nor a second
    longer. Where half are not there, `straggler_factor` times as long as usual. 0: nothing is learnt."""
    wave_size: int = Field(default=4, ge=1)
    """`adaptive`: most candidates drawn at once."""
    stop_cost: float = Field(default=0.13, ge=0)
    """`adaptive`: a candidate is drawn while it is expected to better the best reward by this much, in deviations
    of one prompt's rewards as learnt on this route."""
    stop_at_min_reward: bool = False
    """`adaptive`: stop as soon as a candidate reaches `min_reward`."""
    prune_first_chars: int = Field(default=256, ge=1)
    """`speculative`: characters after which the answers' beginnings are compared for the first time."""
    prune_growth: float = Field(default=2.0, gt=1)
    """`speculative`: how much longer they are each time they are compared again."""
    prune_keep: float = Field(default=0.9, gt=0, lt=1)
    """`speculative`: share that goes on after a comparison; one less goes on in any case, until one is left."""
    prune_lag_s: float = Field(default=1.0, ge=0)
    """`speculative`: seconds that slower answers get once half have come to the length."""
