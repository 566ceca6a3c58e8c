"""Settings from a file, the environment and flags, checked; mistakes become one line that says where."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

from feedback.environment import UnsetVariableError, interpolated
from proxy.config import ENV_PREFIX, LOCAL, NamedRouteSettings, RouteSettings, Settings, near_miss
from proxy.config_operations import Section
from proxy.config_reward import RewardSettings


class ConfigError(Exception):
    """A setting is missing, unknown or out of range. One line; names the setting and where it was given."""


def load_settings(file: Path | None = None, flags: Mapping[str, Any] | None = None) -> Settings:
    """Settings from file, environment and flags (nested as the file is).

    `${NAME}` and `${NAME:-default}` in the file are taken from the environment. Raises `ConfigError`.
    """
    values = _read_yaml(file) if file is not None else {}
    _check_environment()

    class Sourced(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=values)

    try:
        values_from_flags: dict[str, Any] = dict(flags or {})
        settings = Sourced(**values_from_flags)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(error, file))) from error
    _check_together(settings)
    return settings


def _check_together(settings: Settings) -> None:
    _check_route("route", settings.route, settings)
    for name in settings.routes:
        _check_route(f"routes.{name}", settings.named_route(name), settings)
        upstream = settings.routes[name].upstream
        if upstream not in (None, LOCAL, settings.default_upstream, *settings.upstreams):
            raise ConfigError(f"routes.{name}.upstream: no upstream is named {upstream}")
    for name in settings.upstreams:
        if settings.upstreams[name].url is None:
            raise ConfigError(f"upstreams.{name}.url is not set")
        if name in (LOCAL, settings.upstream.name):
            raise ConfigError(f"upstreams.{name}: the name is taken; choose another")
    if "default" in settings.reward_models or "none" in settings.reward_models:
        raise ConfigError("reward_models: `default` and `none` have a meaning already; choose another name")
    if settings.upstream.key is not None and settings.upstream.url is None:
        raise ConfigError("upstream.key is set without upstream.url: name the upstream the key is for")
    _check_reward("reward", settings.reward)
    for name, reward in settings.reward_models.items():
        _check_reward(f"reward_models.{name}", reward)
    _check_exposure(settings)


def _check_route(where: str, route: RouteSettings, settings: Settings) -> None:
    if route.best_of > route.max_best_of:
        raise ConfigError(f"{where}.best_of ({route.best_of}) is over {where}.max_best_of ({route.max_best_of})")
    if route.on_reject == "fallback" and route.fallback_model is None:
        raise ConfigError(f"{where}.on_reject is fallback, but {where}.fallback_model names no model")
    for name in route.fallback_routes:
        _check_fallback(where, name, route, settings)
    if route.reward_model not in (None, "default", "none", *settings.reward_models):
        raise ConfigError(f"{where}.reward_model: no reward model is named {route.reward_model}")


def _check_fallback(where: str, name: str, route: RouteSettings, settings: Settings) -> None:
    if name not in settings.routes:
        raise ConfigError(f"{where}.fallback_routes: no route is named {name}{near_miss(name, list(settings.routes))}")
    own = (route.upstream if isinstance(route, NamedRouteSettings) else None) or settings.default_upstream
    other = settings.routes[name].upstream or settings.default_upstream
    keys_pass_on = not settings.server.api_keys and not settings.keys
    if other not in (own, LOCAL) and keys_pass_on and settings.upstream_settings(other).key is None:
        raise ConfigError(
            f"{where}.fallback_routes: {name} would send clients' keys for {own} to {other}. "
            f"Set a key for {other}, or server.api_keys"
        )


_OF_A_MODEL_IN_THIS_PROCESS = ("floors", "objective_weights", "aggregate", "devices", "compile")
"""Settings that a service knows nothing of: whoever sets them would rely on what is not done."""


def _check_reward(where: str, reward: RewardSettings) -> None:
    if reward.url is None and (reward.replicas or reward.key is not None or reward.template is not None):
        raise ConfigError(f"{where}: replicas, key and template are for a service: {where}.url is not set")
    for name in _OF_A_MODEL_IN_THIS_PROCESS:
        if reward.url is not None and getattr(reward, name):
            raise ConfigError(f"{where}.{name} is for a reward model in this process: set it on the service, not here")
    if reward.protocol == "openrlhf" and reward.template is None:
        raise ConfigError(f"{where}.template: the protocol openrlhf sends text; name the chat template to make it with")


def _check_exposure(settings: Settings) -> None:
    holds_key = any(one.key is not None for one in (settings.upstream, *settings.upstreams.values()))
    loopback = settings.server.host in ("127.0.0.1", "::1", "localhost")
    if holds_key and not settings.server.api_keys and not settings.keys and not loopback:
        raise ConfigError(
            f"server.host is {settings.server.host} and an upstream's key is set: anyone who reaches the port would "
            "spend that key. Set server.api_keys or keys, or listen on 127.0.0.1"
        )


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f":{where.line + 1}" if where is not None else ""
        raise ConfigError(f"{file}{line}: not valid YAML") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must hold a mapping of settings")
    try:
        return cast("dict[str, Any]", interpolated(values))
    except UnsetVariableError as error:
        raise ConfigError(f"{file}: {error}") from error


def _check_environment() -> None:
    """A mistyped variable would silently do nothing. Only names within our sections are ours to judge."""
    for section, keys in _sections():
        prefix = f"{ENV_PREFIX}{section.upper()}_"
        for variable in os.environ:
            key = variable.removeprefix(prefix).lower()
            if variable.startswith(prefix) and key not in keys:
                raise ConfigError(f"environment variable {variable}: no such setting{near_miss(key, keys)}")


def _sections() -> Iterator[tuple[str, list[str]]]:
    for name, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield name, list(field.annotation.model_fields)


def _known_settings() -> dict[tuple[str, ...], list[str]]:
    """The settings below every place; `*` stands for the name of an upstream, a route, a key …"""
    known: dict[tuple[str, ...], list[str]] = {(name,): keys for name, keys in _sections()}
    known[()] = list(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        for kind in get_args(field.annotation):
            if isinstance(kind, type) and issubclass(kind, Section):
                known[name, "*"] = list(kind.model_fields)
    return known


def _explain(error: ValidationError, file: Path | None) -> Iterator[str]:
    known = _known_settings()
    source = f"{file}: " if file is not None else ""
    for problem in error.errors(include_input=False, include_url=False):
        location = tuple(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            place = (location[0], "*") if len(location) == 3 else location[:-1]
            hint = near_miss(location[-1], known.get(place, []))
            yield f"{source}{'.'.join(location)}: no such setting{hint}"
        else:
            yield f"{source}{'.'.join(location)}: {problem['msg']}"
