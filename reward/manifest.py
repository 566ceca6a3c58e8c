"""`reward.json`: what a reward model's folder says about itself beyond its weights.

How to render and pool, the scale of served rewards, what it was trained on, how good it was on held-out
data, and probe texts with their raw rewards, by which loading notices a lost head or a different base.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from feedback.records import Message
from reward.errors import ModelLoadError
from reward.normalisation import Normalisation
from reward.objectives import ObjectiveChoice, ObjectiveRule, rule_for
from reward.rendering import Rendered, Template
from reward.scorer import RawScore, Score

FILE_NAME = "reward.json"
FORMAT = 1

Pooling = Literal["last", "mean"]
HeadKind = Literal["sequence_classification", "pooled"]
Aggregate = Literal["mean", "worst", "mean_less_std"]
"""How the rewards of several heads become one: their mean, the lowest, the mean less a multiple of their deviation."""


@dataclass(frozen=True, slots=True)
class Head:
    """Where the scalar comes from."""

    kind: HeadKind = "sequence_classification"
    """`sequence_classification`: what `AutoModelForSequenceClassification` loads. `pooled`: a base with a head of
    ours on pooled hidden states (after the final norm)."""
    pooling: tuple[Pooling, ...] = ("last",)
    """Concatenated: the last token, the mean over the completion."""
    num_layers: int | None = None
    """Layers of the base that are kept; None keeps all."""
    domains: tuple[str, ...] = ()
    """One linear head each, mixed by a gate that sees the prompt only; empty for a single head."""
    layers: tuple[int, ...] = ()
    """Layers whose poolings are concatenated, counted from 1, the last one kept at the end; empty reads that one."""
    heads: int = 1
    """Linear heads side by side: an ensemble."""
    aggregate: Aggregate = "mean"
    """The rule that makes one reward of several heads'."""
    std_coefficient: float = 1.0
    """How many deviations `mean_less_std` takes off."""
    objectives: tuple[str, ...] = ()
    """Linear heads side by side for different things, one each; empty for a single one."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A text whose raw reward is known."""

    prompt: list[Message]
    completion: list[Message]
    raw_reward: float
    by_head: tuple[float, ...] = ()
    """With several objectives: of each head. What a rule makes of them may jump where a floor is near."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Held-out pairwise accuracy of one set, in shares from 0 to 1, with its 95 % Wilson interval."""

    pairs: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Objective:
    """One of several things that a reward model scores for."""

    normalisation: Normalisation
    """Of its head's raw rewards, over the references of its own sources."""
    sources: tuple[str, ...]
    """Of the data that it was learnt from."""
    num_references: int
    accuracy: Accuracy | None = None
    """Of its head, on the held-out pairs of its sources."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole of `reward.json`."""

    name: str
    base: str
    """Folder, hub id or `package:NAME` of the pretrained model. For information where the folder holds all weights."""
    head: Head
    template: Template
    max_length: int
    """Tokens of prompt and completion together; longer prompts are cut."""
    normalisation: Normalisation = field(default_factory=Normalisation)
    num_references: int = 0
    """Reference completions behind the normalisation."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Data files with hashes and counts, seed, configuration, steps: enough to train it again."""
    accuracy: Mapping[str, Accuracy] = field(default_factory=dict)
    probes: tuple[Probe, ...] = ()
    scales: Mapping[Aggregate, Normalisation] = field(default_factory=dict)
    """Of an ensemble: what `normalisation` would be under each rule."""
    objectives: Mapping[str, Objective] = field(default_factory=dict)
    """By name, in the order of the heads."""
    rule: ObjectiveRule | None = None
    """With several objectives: how their rewards become one."""

    @property
    def objective_scales(self) -> dict[str, Normalisation]:
        """By objective, in the order of the heads."""
        return {name: objective.normalisation for name, objective in self.objectives.items()}

    def score(self, raw: RawScore, item: Rendered) -> Score:
        """What is served of a completion: `raw` on the scale of the references."""
        reward = self.normalisation.reward(raw.reward)
        return Score(
            reward=reward,
            raw_reward=raw.reward,
            percentile=self.normalisation.percentile(reward),
            truncated=item.truncated,
            prompt_tokens=item.prompt_tokens,
            completion_tokens=item.completion_tokens,
            std=statistics.pstdev(raw.by_head) / self.normalisation.std if self.head.heads > 1 else None,
            objectives=self._by_objective(raw) if self.objectives else None,
        )

    def _by_objective(self, raw: RawScore) -> dict[str, float]:
        scales = self.objective_scales.items()
        return {name: scale.reward(own) for (name, scale), own in zip(scales, raw.by_head, strict=True)}

    def save(self, folder: Path) -> None:
        """Writes `reward.json` into `folder`."""
        record = {"format": FORMAT, **dataclasses.asdict(self)}
        (folder / FILE_NAME).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_manifest(folder: Path) -> Manifest | None:
    """None where there is no `reward.json`. Raises `ModelLoadError` naming the file and member that is wrong."""
    path = folder / FILE_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        record = json.loads(text)
        return _parse(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ModelLoadError(f"{path}: {what}") from error


def _parse(record: dict[str, Any]) -> Manifest:
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']!r} is not {FORMAT}: written by another version of winnow")
    head = record["head"]
    if head["kind"] not in get_args(HeadKind):
        raise ValueError(f"head.kind {head['kind']!r} is not one of {', '.join(get_args(HeadKind))}")
    if not head["pooling"] or set(head["pooling"]) - set(get_args(Pooling)):
        raise ValueError(f"head.pooling {head['pooling']!r} must list some of {', '.join(get_args(Pooling))}")
    layers = tuple(head.get("layers", ()))  # models with one layer may have been saved without
    if layers and (list(layers) != sorted({*layers}) or layers[0] < 1 or layers[-1] != head["num_layers"]):
        raise ValueError(f"head.layers {list(layers)} must rise from 1 or more to num_layers, {head['num_layers']}")
    if record["template"] not in get_args(Template):
        raise ValueError(f"template {record['template']!r} is not one of {', '.join(get_args(Template))}")
    if not isinstance(record["max_length"], int) or record["max_length"] < 8:
        raise ValueError(f"max_length {record['max_length']!r} must be an integer of at least 8")
    if head.get("aggregate", "mean") not in get_args(Aggregate):
        raise ValueError(f"head.aggregate {head['aggregate']!r} is not one of {', '.join(get_args(Aggregate))}")
    return Manifest(
        name=record["name"],
        base=record["base"],
        head=Head(
            head["kind"],
            tuple(head["pooling"]),
            head["num_layers"],
            tuple(head["domains"]),
            layers,
            # Models with one head may have been saved without these.
            head.get("heads", 1),
            head.get("aggregate", "mean"),
            head.get("std_coefficient", 1.0),
            tuple(head.get("objectives", ())),
        ),
        template=record["template"],
        max_length=record["max_length"],
        normalisation=_scale(record["normalisation"]),
        scales={rule: _scale(scale) for rule, scale in record.get("scales", {}).items()},
        num_references=record["num_references"],
        training=record["training"],
        accuracy={name: Accuracy(**fields) for name, fields in record["accuracy"].items()},
        probes=tuple(_probe(**probe) for probe in record["probes"]),
        **_objectives(record, head),
    )


def _probe(prompt: list[Message], completion: list[Message], raw_reward: float, by_head: Sequence[float] = ()) -> Probe:
    return Probe(prompt, completion, raw_reward, tuple(by_head))


def _objectives(record: dict[str, Any], head: dict[str, Any]) -> dict[str, Any]:
    """What there is of several objectives. Models with one may have been saved without."""
    found, rule = record.get("objectives", {}), record.get("rule")
    if found and (list(found) != list(head.get("objectives", ())) or rule is None):
        raise ValueError(f"objectives {list(found)} must be those of head.objectives, and have a rule")
    objectives = {
        name: Objective(
            _scale(one["normalisation"]),
            tuple(one["sources"]),
            one["num_references"],
            None if one["accuracy"] is None else Accuracy(**one["accuracy"]),
        )
        for name, one in found.items()
    }
    if rule is None:
        return {}
    scales = {name: objective.normalisation for name, objective in objectives.items()}
    return {"objectives": objectives, "rule": rule_for(ObjectiveChoice(rule["weights"], rule["floors"]), scales)}


def _scale(record: dict[str, Any]) -> Normalisation:
    return Normalisation(record["mean"], record["std"], tuple(record["quantiles"]))
