"""What a reload keeps, and what it makes anew: by settings, and by the files that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from proxy.config_loading import load_settings
from reward.metrics import ScoreMetrics
from winnow.parts import NOTHING, MadeParts, make_parts

HOSTED: dict[str, Any] = {"upstream": {"url": "http://127.0.0.1:9/v1"}}


def made(sections: dict[str, Any], before: MadeParts = NOTHING) -> MadeParts:
    return make_parts(load_settings(flags=sections), ScoreMetrics(CollectorRegistry()), before)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0].content }}", encoding="utf-8")
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def test_a_template_that_was_edited_in_place_makes_another_scorer(template: Path) -> None:
    reward = {"url": "http://127.0.0.1:9/v1", "protocol": "openrlhf", "template": str(template)}
    before = made(HOSTED | {"reward": reward})
    same = made(HOSTED | {"reward": reward}, before)
    assert same.parts.scorers["default"] is before.parts.scorers["default"]
    template.write_text("{{ messages[1].content }}", encoding="utf-8")
    after = made(HOSTED | {"reward": reward}, same)
    assert after.parts.scorers["default"] is not before.parts.scorers["default"]
    (name,) = before.parts.upstreams
    assert after.parts.upstreams[name] is before.parts.upstreams[name]


def test_a_model_published_anew_under_its_name_is_loaded_anew(model: Path) -> None:
    sections = {"local": {"model": str(model)}, "reward": {"model": str(model)}}
    before = made(sections)
    same = made(sections, before)
    (model / "model.safetensors").write_bytes(b"weights")
    after = made(sections, same)
    for kind in ("upstreams", "scorers"):
        ours, theirs, new = (next(iter(getattr(one.parts, kind).values())) for one in (same, before, after))
        assert ours is theirs
        assert new is not theirs


def test_what_is_no_folder_stays_as_it_is() -> None:
    sections = HOSTED | {"reward": {"model": "somebody/on-a-hub"}}
    before = made(sections)
    assert made(sections, before).parts.scorers["default"] is before.parts.scorers["default"]
