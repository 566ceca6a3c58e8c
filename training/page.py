"""Pages to look at: templates beside this file, filled in. Nothing in them asks for anything from the network."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, drawn: Mapping[str, bytes], **context: object) -> str:
    """HTML. `drawn`: figures as SVG, by name; in the template they are `images`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, points=_points, p=_p, signed=_signed)
    images = {
        name: Markup("data:image/svg+xml;base64,") + base64.b64encode(svg).decode() for name, svg in drawn.items()
    }
    return environment.get_template(template).render(images=images, **context)


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.1%}"


def _points(value: float) -> str:
    return f"{value * 100:+.1f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
