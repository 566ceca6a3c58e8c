"""An evaluation as a page to look at: one HTML file that asks nothing of the network, figures as PNG, the numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from feedback.jsonl import replacing
from training.figures import as_png, as_svg, figures
from training.page import render
from training.reports import EvaluationReport

PAGE, NUMBERS = "index.html", "report.json"


def write_report(folder: Path, report: EvaluationReport, made: datetime) -> Path:
    """Writes the figures, the numbers and last the page; returns the page. Each file appears only when whole.

    Raises OSError where the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, figure in figures(report):
        with replacing(folder / f"{name}.png") as partial:
            partial.write_bytes(as_png(figure))
        drawn[name] = as_svg(figure)
    with replacing(folder / NUMBERS) as partial:
        partial.write_text(json.dumps(report.as_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    with replacing(folder / PAGE) as partial:
        partial.write_text(page(report, drawn, made), encoding="utf-8")
    return folder / PAGE


def page(report: EvaluationReport, drawn: Mapping[str, bytes], made: datetime) -> str:
    """HTML. `drawn`: the figures as SVG, by name."""
    return render("report_page.html.jinja", drawn, report=report, made=made.strftime("%Y-%m-%d %H:%M UTC"))
