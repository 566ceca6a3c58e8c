"""A trained network becomes a reward model on disk: weights, `reward.json` with scale and probes, model card.

Everything that the folder says of itself is measured on the folder as loaded back from disk, through the same
code that serves it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors.torch import save_file

from feedback.rankings import ComparisonGroup
from feedback.records import Message
from reward.ensembles import EnsembleHead
from reward.manifest import Accuracy, Aggregate, Manifest, Probe
from reward.model import REFERENCES_FILE, RewardModel, load_reward_model
from reward.normalisation import Normalisation
from reward.objective_head import ObjectivesHead
from reward.rendering import Rendered
from training import objectives
from training.evaluation import POOLED, accuracy_of, by_source, pair_outcomes
from training.model_card import model_card
from training.models import TrainableReward, save_weights
from training.options import OptionsError, RewardOptions
from training.runs import file_digest

PROBES: tuple[tuple[str, str], ...] = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How do I boil an egg?", "Put it into boiling water for eight minutes, then into cold water."),
    ("Name three primary colours.", "idk, colours i guess"),
)
"""Asked of every model on load. What they are does not matter; that their rewards do not change does."""


def publish(
    trainable: TrainableReward,
    options: RewardOptions,
    *,
    target: Path,
    train: Sequence[ComparisonGroup],
    validation: Sequence[ComparisonGroup],
    facts: Mapping[str, Any],
    device: str,
) -> None:
    """Writes the reward model to `target`, which appears only when whole.

    References for the scale are the completions of `validation` (of `train` where there is none).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        save_weights(trainable, options, partial)
        manifest = Manifest(
            name=options.name,
            base=options.base,
            head=trainable.head,
            template=trainable.renderer.template,
            max_length=trainable.renderer.max_length,
            training=_training_facts(options, train, validation, facts),
        )
        manifest.save(partial)
        model = load_reward_model(str(partial), device=device, trust_remote_code=options.trust_remote_code)
        manifest = _measured(manifest, model, train, validation, options, partial)
        manifest.save(partial)
        (partial / "README.md").write_text(model_card(manifest), encoding="utf-8")
        partial.chmod(0o755)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _measured(
    manifest: Manifest,
    model: RewardModel,
    train: Sequence[ComparisonGroup],
    validation: Sequence[ComparisonGroup],
    options: RewardOptions,
    folder: Path,
) -> Manifest:
    references = validation or train
    rendered = render_groups(model, references)
    raw_scores = model.raw_scores_of_all(rendered)
    rewards = [raw.reward for raw in raw_scores]
    if options.objectives:
        by_head = [raw.by_head for raw in raw_scores]
        manifest, rewards = _with_objectives(manifest, model, (references, by_head), options, folder)
    accuracy: dict[str, Accuracy] = {}
    if validation:
        outcomes = pair_outcomes(validation, rewards)
        accuracy = {source: accuracy_of(own) for source, own in by_source(outcomes).items()}
        if len(accuracy) > 1:
            accuracy[POOLED] = accuracy_of(outcomes)
    probes = []
    for question, answer in PROBES:
        prompt: list[Message] = [{"role": "user", "content": question}]
        completion: list[Message] = [{"role": "assistant", "content": answer}]
        (raw,) = model.raw_scores([model.renderer.render(prompt, completion)])
        probes.append(Probe(prompt, completion, raw.reward, raw.by_head if options.objectives else ()))
    try:
        # With objectives they are on those' scales already; a mean over refused ones too would mean nothing.
        fit = Normalisation.with_quantiles_of if options.objectives else Normalisation.fit
        normalisation = fit(rewards)
        scales = _scales(model, rendered)
    except ValueError as error:
        raise OptionsError(f"the trained model cannot be normalised: {error}") from error
    return replace(
        manifest,
        normalisation=normalisation,
        scales=scales,
        num_references=len(rewards),
        accuracy=accuracy,
        probes=tuple(probes),
    )


def _with_objectives(
    manifest: Manifest,
    model: RewardModel,
    references: tuple[Sequence[ComparisonGroup], list[tuple[float, ...]]],
    options: RewardOptions,
    folder: Path,
) -> tuple[Manifest, list[float]]:
    """The manifest with each objective's scale and the rule, by which the model goes from now on, and the rewards of
    the references by it. What the heads gave them is kept in `folder`, for percentiles under another rule."""
    groups, by_head = references
    found, rule = objectives.measured(options, groups, by_head)
    manifest = replace(manifest, objectives=found, rule=rule)
    head = cast(ObjectivesHead, model.network.head)
    head.follow(rule, manifest.objective_scales)
    rewards = torch.tensor(by_head)
    save_file({"rewards": rewards}, folder / REFERENCES_FILE)
    return manifest, head.combine(rewards).tolist()


def _scales(model: RewardModel, references: Sequence[Rendered]) -> dict[Aggregate, Normalisation]:
    """Of an ensemble, the scale under each rule. Raises ValueError as `Normalisation.fit` does."""
    head = getattr(model.network, "head", None)
    if not isinstance(head, EnsembleHead):
        return {}
    scales: dict[Aggregate, Normalisation] = {}
    trained = head.rule
    for rule in get_args(Aggregate):
        head.rule = rule
        scales[rule] = Normalisation.fit(model.score_all(references))
    head.rule = trained
    return scales


def render_groups(model: RewardModel, groups: Sequence[ComparisonGroup]) -> list[Rendered]:
    """All completions of all groups, group after group; a prompt is encoded once where that can be."""
    return [
        item
        for group in groups
        for item in model.shared([model.renderer.render(group.prompt, one) for one in group.completions])
    ]


def _training_facts(
    options: RewardOptions,
    train: Sequence[ComparisonGroup],
    validation: Sequence[ComparisonGroup],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    def described(files: Sequence[str]) -> list[dict[str, Any]]:
        return [{"file": Path(file).name, "sha256": file_digest(file)} for file in files]

    counts: dict[str, int] = {}
    for group in train:
        counts[group.source] = counts.get(group.source, 0) + len(group.pairs)
    # Paths of this machine say nothing elsewhere.
    config = options.model_dump(mode="json", exclude={"train", "validation", "gate_prompts", "output"})
    return {
        "data": described(options.train),
        "validation_data": described(options.validation),
        "gate_data": described([file for files in options.gate_prompts.values() for file in files]),
        "pairs": counts,
        "prompts": len(train),
        "validation_pairs": sum(len(group.pairs) for group in validation),
        "seed": options.seed,
        "config": config,
        **facts,
    }
