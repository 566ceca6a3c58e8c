"""The proxy's real parts, made from settings: upstreams and reward models, kept where their settings stay."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from winnow.console import CommandError
from winnow.version import __version__

if TYPE_CHECKING:
    from feedback.judgements import FeedbackStore
    from proxy.app import Parts
    from proxy.config import Settings, UpstreamSettings
    from proxy.config_reward import RewardSettings
    from proxy.tracing import Tracing
    from proxy.upstreams.base import Upstream
    from reward.metrics import ScoreMetrics
    from reward.objectives import ObjectiveChoice
    from reward.scorer import Scorer


_Origin = object
"""What a part was made from, settings and the files that they name: compared, never looked into."""


@dataclass(frozen=True, slots=True)
class MadeParts:
    """Parts, and what they were made from."""

    upstreams: Mapping[str, tuple[_Origin, Upstream]]
    scorers: Mapping[str, tuple[_Origin, Scorer]]
    store: tuple[_Origin, FeedbackStore] | None = None
    tracing: Tracing | None = None
    """Made once: what is traced does not change while the server runs."""
    turns: threading.Lock = field(default_factory=threading.Lock)
    """Shared by all models of this process, on devices where they must take turns."""

    @property
    def parts(self) -> Parts:
        from proxy.app import Parts

        return Parts(
            {name: upstream for name, (_, upstream) in self.upstreams.items()},
            {name: scorer for name, (_, scorer) in self.scorers.items()},
            self.store[1] if self.store is not None else None,
            self.tracing.application if self.tracing is not None else None,
        )


NOTHING = MadeParts({}, {})


def make_parts(
    settings: Settings, score_metrics: ScoreMetrics, before: MadeParts = NOTHING, *, scores_only: bool = False
) -> MadeParts:
    """The parts that these settings need; those made from the same as `before` are the same objects.

    With `scores_only` those of the scoring service: reward models, and no upstream. Nothing is opened here. Raises
    `CommandError` where a part's own needs are not installed, `ValueError` for a database URL that is none.
    """
    tracing = _tracing(settings) if before is NOTHING else before.tracing
    turns = before.turns
    if scores_only and settings.reward.model == "none":
        raise CommandError("a scoring service needs a reward model: reward.model is none")
    upstreams = _absent(settings) if scores_only else _upstreams(settings, tracing, before)
    scorers: dict[str, tuple[_Origin, Scorer]] = {}
    for name, reward in {"default": settings.reward, **settings.reward_models}.items():
        if reward.model == "none":
            continue
        made_from = (reward, settings.device, settings.dtype, _on_disk(reward.template), _on_disk(reward.model))
        had = before.scorers.get(name)
        stays = had is not None and had[0] == made_from
        scorers[name] = (
            had
            if had is not None and stays
            else (made_from, _scorer(name, reward, settings, score_metrics, tracing, turns))
        )
    return MadeParts(upstreams, scorers, _store(settings, before), tracing, turns)


def _absent(settings: Settings) -> dict[str, tuple[_Origin, Upstream]]:
    from proxy.upstreams.absent import AbsentUpstream

    return {name: (None, AbsentUpstream(name)) for name in settings.used_upstreams}


def _upstreams(settings: Settings, tracing: Tracing | None, before: MadeParts) -> dict[str, tuple[_Origin, Upstream]]:
    upstreams: dict[str, tuple[_Origin, Upstream]] = {}
    for name in settings.used_upstreams:
        origin = _upstream_origin(name, settings)
        kept = before.upstreams.get(name)
        upstreams[name] = (
            kept
            if kept is not None and kept[0] == origin
            else (origin, _upstream(name, settings, tracing, before.turns))
        )
    return upstreams


def _upstream_origin(name: str, settings: Settings) -> _Origin:
    hosted = settings.upstream_settings(name)
    if hosted.url is not None:
        return hosted
    return settings.local, settings.device, settings.dtype, _on_disk(settings.local.model)


def _on_disk(name: str | None) -> _Origin:
    """What a file or a model's folder is as it lies there, so that one changed in place is another. Empty for the rest.

    Not what an adapter or a head in that folder says of its base.
    """
    path = None if name is None else Path(name).expanduser()
    if path is None or not path.exists():
        return ()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [(file.name, file.stat()) for file in files if file.is_file()]
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def _upstream(name: str, settings: Settings, tracing: Tracing | None, turns: threading.Lock) -> Upstream:
    hosted = settings.upstream_settings(name)
    upstream = _local(settings, turns) if hosted.url is None else _hosted(hosted)
    return upstream if tracing is None else tracing.upstream(upstream)


def _hosted(settings: UpstreamSettings) -> Upstream:
    from proxy.upstreams.hosted import HostedUpstream

    return HostedUpstream(settings)


def _tracing(settings: Settings) -> Tracing | None:
    if not settings.tracing.enabled:
        return None
    if importlib.util.find_spec("opentelemetry") is None or importlib.util.find_spec("opentelemetry.sdk") is None:
        raise CommandError("tracing needs OpenTelemetry: install winnow[otel], or set tracing.enabled to false")
    from proxy.tracing import Tracing

    return Tracing(settings.tracing, __version__)


def _scorer(
    name: str,
    reward: RewardSettings,
    settings: Settings,
    metrics: ScoreMetrics,
    tracing: Tracing | None,
    turns: threading.Lock,
) -> Scorer:
    scorer = _local_scorer(reward, settings, metrics, turns) if reward.url is None else remote_scorer(name, reward)
    return scorer if tracing is None else tracing.scorer(scorer)


def remote_scorer(name: str, reward: RewardSettings) -> Scorer:
    """The scorer of a service. Raises `CommandError` for a template that cannot be read."""
    from proxy.scoring_transport import ReplicatedTransport
    from reward.dialects import ChatTemplate, dialect
    from reward.normalisation import Normalisation
    from reward.remote import RemoteScorer

    model = None if reward.model == "default" else reward.model
    template = None
    if reward.template is not None:
        try:
            template = ChatTemplate(Path(reward.template).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CommandError(f"reward.template: {reward.template} cannot be used: {error}") from error
    return RemoteScorer(
        model or name,
        dialect(reward.protocol, model, template),
        ReplicatedTransport(f"the reward model {model or name}", reward),
        normalisation=Normalisation(reward.mean, reward.std),
    )


def _local_scorer(reward: RewardSettings, settings: Settings, metrics: ScoreMetrics, turns: threading.Lock) -> Scorer:
    _require_torch("the reward model", "or set reward.model to none")
    from reward.batching import BatchingOptions
    from reward.local import LocalScorer
    from reward.shared_prefix import SharingOptions

    batching = BatchingOptions(
        max_batch_tokens=reward.max_batch_tokens,
        max_batch_size=reward.max_batch_size,
        max_padding=reward.max_padding,
        max_queue=reward.max_queue,
    )
    return LocalScorer(
        reward.model,
        device=settings.device,
        devices=reward.devices,
        dtype=settings.dtype,
        batching=batching,
        metrics=metrics,
        trust_remote_code=reward.trust_remote_code,
        aggregate=reward.aggregate,
        objectives=_objective_choice(reward),
        turns=_taken(turns, settings),
        sharing=SharingOptions(reward.shared_prefix, reward.prefix_cache_tokens),
        compiled=reward.compile,
    )


def _objective_choice(reward: RewardSettings) -> ObjectiveChoice | None:
    if reward.floors is None and reward.objective_weights is None:
        return None
    from reward.objectives import ObjectiveChoice

    return ObjectiveChoice(reward.objective_weights, reward.floors)


def _store(settings: Settings, before: MadeParts) -> tuple[_Origin, FeedbackStore] | None:
    """SQLAlchemy is loaded only where candidates are kept."""
    if not settings.keeps_candidates:
        return None
    if before.store is not None and before.store[0] == settings.feedback:
        return before.store
    from feedback.store import DatabaseStore

    return settings.feedback, DatabaseStore(settings.feedback.database.get_secret_value())


def _local(settings: Settings, turns: threading.Lock) -> Upstream:
    _require_torch("the embedded model", "or name an upstream with --upstream-url")
    from proxy.upstreams.local import LocalUpstream

    local = settings.local
    return LocalUpstream(
        local.model,
        served_name=local.served_name,
        device=settings.device,
        dtype=settings.dtype,
        max_batch_size=local.max_batch_size,
        max_new_tokens=local.max_new_tokens,
        max_queue=local.max_queue,
        trust_remote_code=local.trust_remote_code,
        turns=_taken(turns, settings),
    )


def _taken(turns: threading.Lock, settings: Settings) -> threading.Lock | None:
    from reward.devices import threads_must_take_turns

    return turns if threads_must_take_turns(settings.device) else None


def _require_torch(what: str, otherwise: str) -> None:
    """The proxy itself runs without torch: only who wants a model in the process needs it."""
    if importlib.util.find_spec("torch") is None:
        raise CommandError(f"{what} needs torch: install winnow[reward], {otherwise}")
