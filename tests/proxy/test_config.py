"""Settings: precedence, typos, settings that cannot work together."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from proxy.config import Settings
from proxy.config_loading import ConfigError, load_settings
from proxy.keys import KeyRing


def test_flags_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "w.yaml"
    file.write_text("route: {best_of: 2, min_reward: p20, max_candidates: 9}\nserver: {port: 1}\n")
    monkeypatch.setenv("WINNOW_ROUTE_BEST_OF", "3")
    monkeypatch.setenv("WINNOW_ROUTE_MAX_CANDIDATES", "10")
    settings = load_settings(file, {"route": {"best_of": 4}})
    assert settings.route.best_of == 4
    assert settings.route.max_candidates == 10
    assert settings.route.min_reward == "p20"
    assert settings.server.port == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("route: {best_fo: 2}", "route.best_fo: no such setting; did you mean best_of"),
        ("rout: {}", "rout: no such setting; did you mean route"),
        ("route: {best_of: zero}", "route.best_of"),
        ("- a", "must hold a mapping"),
        ("a: [", "not valid YAML"),
        ("route: {on_reject: fallback}", "fallback_model"),
        ("route: {best_of: 65}", "max_best_of"),
        ("route: {min_reward: p101}", "min_reward"),
        ("upstream: {key: k}", "without upstream.url"),
        (
            "reward: {url: 'http://g/v1', floors: {harmless: p20}}",
            "reward.floors is for a reward model in this process",
        ),
        ("reward_models: {b: {url: 'http://g/v1', devices: [all]}}", "reward_models.b.devices is for a reward model"),
        ("{upstream: {url: 'http://h/v1', key: k}, server: {host: 0.0.0.0}}", "Set server.api_keys"),
    ],
)
def test_mistakes_are_one_line_that_says_where(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "w.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(file)
    assert "\n" not in str(caught.value)


def test_a_mistyped_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_UPSTREAM_ULR", "http://h/v1")
    with pytest.raises(ConfigError, match="WINNOW_UPSTREAM_ULR: no such setting; did you mean url"):
        load_settings()


def test_variables_of_other_rooms_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_CACHE_DIR", "/x")
    monkeypatch.setenv("WINNOW_DATA", "/y")
    load_settings()


def test_keys_show_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_UPSTREAM_KEY", "very-secret")
    monkeypatch.setenv("WINNOW_SERVER_API_KEYS", "also-secret, third-secret")
    settings = load_settings(flags={"upstream": {"url": "http://h/v1"}})
    assert len(settings.server.api_keys) == 2
    assert "secret" not in repr(settings) + settings.model_dump_json()


def test_every_setting_is_described() -> None:
    for name, section in Settings.model_fields.items():
        assert section.description, name
        fields = getattr(section.annotation, "model_fields", {})
        for key, field in fields.items():
            assert field.description, f"{name}.{key}"


def test_malformed_hashes_are_refused() -> None:
    with pytest.raises(ValueError, match="64 hexadecimal"):
        KeyRing([SecretStr("sha256:abc")])
