"""The documentation keeps up with the code: generated pages are fresh, and nothing that users touch is missing."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from docs import generate
from feedback.records import parse_preference, parse_ranking
from proxy import errors
from proxy.config import Settings
from proxy.metrics import ProxyMetrics
from proxy.origins import EXPOSED_HEADERS
from proxy.request import WinnowField
from proxy.routes import operations
from proxy.routes.feedback import FeedbackRequest
from proxy.routes.score import ScoreRequest
from reward.manifest import Manifest
from reward.metrics import ScoreMetrics
from training.fitting import DECIDING
from training.hosted.options import HostedOptions
from training.options import RewardOptions

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
_OURS = ("deploy", "docs", "examples", "benchmarks", "reward", "training")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in _OURS for page in (ROOT / folder).rglob("*.md"))])


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", generate.pages())
def test_generated_pages_are_fresh(name: str) -> None:
    assert read(name) == generate.pages()[name], "run `make docs`"


def test_the_generator_says_that_a_page_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["generate.py", "--check"])
    with pytest.raises(SystemExit) as stale:
        generate.main()
    assert stale.value.code == 1
    assert "settings.md is stale" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("sys.argv", ["generate.py"])
    with pytest.raises(SystemExit) as written:
        generate.main()
    assert written.value.code == 0
    assert sorted(page.name for page in tmp_path.iterdir()) == sorted(generate.pages())


def test_every_command_and_flag_is_documented() -> None:
    page = read("commands.md")
    names = [path for path, _ in generate.commands()]
    assert {"winnow serve", "winnow ask", "winnow score", "winnow reward eval", "winnow train reward"} <= set(names)
    assert [name for name in names if f"## `{name}`" not in page] == []
    assert [flag for flag in generate.documented_flags() if f"`{flag}`" not in page] == []


def metrics() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every metric of the code by the name that Prometheus sees, with its labels."""
    registry = CollectorRegistry()
    holders = (ProxyMetrics(registry, "0"), ScoreMetrics(registry))
    label_names = {
        metric._name: tuple(metric._labelnames)
        for holder in holders
        for metric in vars(holder).values()
        if isinstance(metric, MetricWrapperBase)
    }
    for family in registry.collect():
        yield (f"{family.name}_total" if family.type == "counter" else family.name), label_names.get(family.name, ())


def test_every_metric_and_label_is_documented() -> None:
    rows = [line for line in read("metrics.md").splitlines() if line.startswith("| `winnow_")]
    documented = {line.split("`")[1]: line.split("|")[2] for line in rows}
    assert dict.fromkeys(name for name, _ in metrics()) == dict.fromkeys(documented)
    for name, labels in metrics():
        assert [label for label in labels if f"`{label}`" not in documented[name]] == [], name


def test_every_header_of_ours_is_documented() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "proxy").rglob("*.py")]
    headers = {header for source in sources for header in re.findall(r"x-winnow-[a-z-]+[a-z]", source)}
    assert len(headers) > 8
    assert [header for header in sorted(headers) if f"`{header}`" not in read("api.md")] == []


def test_a_pages_script_may_read_every_header_of_an_answer() -> None:
    told = set(re.findall(r"^\| `(x-winnow-[a-z-]+)` \| .", read("api.md"), re.MULTILINE))
    assert len(told) > 12
    assert told <= set(EXPOSED_HEADERS)


def test_every_request_field_error_and_path_is_documented() -> None:
    page = read("api.md")
    assert [field for field in WinnowField.model_fields if f"`{field}`" not in page] == []
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ProxyError)]
    assert [kind.code for kind in kinds if kind.code is not None and f"`{kind.code}`" not in page] == []
    assert [kind.status for kind in kinds if str(kind.status) not in page] == []
    assert [path for path in operations.PATHS if f"`{path}`" not in page] == []


def test_every_member_of_the_manifest_and_every_training_metric_is_documented() -> None:
    page = read("reward-models.md")
    assert [name for name in Manifest.__dataclass_fields__ if f"`{name}`" not in page] == []
    logged = set(logged_metrics(ROOT / "training" / "reward_model.py"))
    assert {"loss", "validation_accuracy"} <= logged
    assert [name for name in sorted(logged) if f"| `{name}`" not in page] == []


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_every_metric_of_the_trainers_of_policies_is_documented(method: str) -> None:
    section = read("training.md").partition({"sft": "## Demonstrations", "dpo": "## Preferences"}[method])[2]
    rows = "".join(re.findall(r"^\| (`.*?) \|", section.partition("\n## ")[0], re.MULTILINE))
    logged = set(returned_metrics(ROOT / "training" / f"{method}.py")) | {"grad_norm", "learning_rate"}
    assert {"loss", "validation_loss"} <= logged
    assert [name for name in sorted(logged) if f"`{name}`" not in rows] == []


def returned_metrics(source: Path) -> Iterator[str]:
    """Keys of the dictionaries that functions return; the deciding one is named by a constant."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Dict):
            for key in node.value.keys:
                yield DECIDING if isinstance(key, ast.Name) else str(key.value)  # type: ignore[union-attr]


def logged_metrics(source: Path) -> Iterator[str]:
    """Keys of the dictionaries that are logged: those in calls of `.metrics`, and what `_step` returns."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "metrics":
            dictionaries = [argument for argument in node.args if isinstance(argument, ast.Dict)]
        elif isinstance(node, ast.FunctionDef) and node.name == "_step":
            dictionaries = [
                one.value for one in node.body if isinstance(one, ast.Return) and isinstance(one.value, ast.Dict)
            ]
        else:
            continue
        yield from (str(key.value) for one in dictionaries for key in one.keys if isinstance(key, ast.Constant))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_our_pages_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """Of headings, as code hosts make them: lower case, punctuation dropped, spaces to hyphens."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_in_pages_is_well_formed(page: Path) -> None:
    for number, code in enumerate(fences(page, "python")):
        compile(code, f"{page.name}[{number}]", "exec")
    for document in fences(page, "yaml"):
        yaml.safe_load(document)


def test_settings_and_records_in_pages_are_accepted() -> None:
    page = DOCS / "reward-models.md"
    served, configuration, objectives = fences(page, "yaml")
    assert Settings.model_validate(yaml.safe_load(served)).reward.url == "http://gpu-1:8001/v1"
    assert RewardOptions.model_validate(yaml.safe_load(configuration)).tuning == "head"
    both = yaml.safe_load(configuration) | yaml.safe_load(objectives)
    assert RewardOptions.model_validate(both).floors == {"harmless": "p20"}
    preference, ranking = (json.loads(line) for line in "".join(fences(page, "json")).splitlines())
    assert parse_preference(preference).chosen[0]["content"] == "Hello!"
    assert parse_ranking(ranking).ranks == [1, 1, 3]
    asked, answered, judged = (json.loads(block) for block in fences(DOCS / "api.md", "json"))
    assert FeedbackRequest.model_validate(judged).ranking == [[2], [0, 1], [3]]
    assert len(ScoreRequest.model_validate(asked).completions) == len(answered["scores"])
    tuned, route = fences(DOCS / "hosted.md", "yaml")
    assert HostedOptions.model_validate(yaml.safe_load(tuned)).beta == 0.1
    assert Settings.model_validate(yaml.safe_load(route)).routes["tuned"].upstream == "together"
    for document in fences(DOCS / "settings.md", "yaml"):
        assert Settings.model_validate(yaml.safe_load(document)).route.best_of == 8


def test_every_page_is_reachable_from_the_architecture() -> None:
    """A page that nobody links to is a page that nobody reads."""
    reached, pending = set(), [ROOT / "ARCHITECTURE.md"]
    while pending:
        page = pending.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#:\s]+\.md)", page.read_text(encoding="utf-8"))
        pending += [(page.parent / link).resolve() for link in links]
    assert sorted(str(page.relative_to(ROOT)) for page in DOCS.rglob("*.md") if page not in reached) == []
