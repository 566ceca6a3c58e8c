"""README.md of a reward model, made from its manifest alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reward.manifest import Manifest
from reward.objectives import LEAST_ACCEPTED
from training.evaluation import POOLED


def model_card(manifest: Manifest) -> str:
    """Markdown, with the metadata block that model hubs read."""
    training = manifest.training
    head = manifest.head
    scale = manifest.normalisation
    layers = "all layers" if head.num_layers is None else f"the first {head.num_layers} layers"
    of_layers = f" of layers {', '.join(map(str, head.layers))}" if head.layers else ""
    card = training["config"].get("card") or {}
    lines = [
        "---",
        "library_name: winnow",
        "pipeline_tag: text-classification",
        "tags: [reward-model]",
        *([f"license: {card['licence'].lower()}"] if card.get("licence") else []),
        "---",
        "",
        f"# {manifest.name}",
        "",
        "A reward model: it gives (prompt, completion) one number, higher for what people would rather have.",
        f"Base: `{manifest.base}`, {layers}. Tuning: {training['config']['tuning']}. "
        f"The head sees: {', '.join(head.pooling)}{of_layers}.",
    ]
    if head.domains:
        lines += [
            "",
            f"It has a linear head for each of {len(head.domains)} domains ({', '.join(head.domains)}), mixed by a "
            "gate that sees the prompt only.",
        ]
    if head.heads > 1:
        rules = {"mean": "their mean", "worst": "the lowest", "mean_less_std": "the mean less their deviation"}
        rule = rules[head.aggregate]
        lines += ["", f"It is an ensemble of {head.heads} linear heads on one base; the reward is {rule}."]
    lines += _objectives(manifest)
    lines += [
        "",
        "```bash",
        "winnow score --reward-model . records.jsonl",
        "winnow serve --upstream-url https://… --reward-model . --best-of 4",
        "```",
        "",
        "## Held-out accuracy",
        "",
        "Share of human comparisons in the people's order, with 95 % Wilson intervals. Half is chance.",
        "",
        "| set | pairs | accuracy | 95 % interval |",
        "| --- | ---: | ---: | --- |",
    ]
    for name, accuracy in manifest.accuracy.items():
        label = "**all**" if name == POOLED else name
        lines.append(
            f"| {label} | {accuracy.pairs} | {accuracy.accuracy:.1%} | {accuracy.low:.1%} – {accuracy.high:.1%} |"
        )
    if not manifest.accuracy:
        lines.append("| no validation data was given | | | |")
    lines += [
        "",
        "## Rewards",
        "",
        _scale(manifest),
        "A percentile is the share of those references that a completion beats: `min_reward: p20` refuses what is",
        "worse than the worst fifth of them. It does not mean that a fifth of your answers are refused, nor that",
        "these are bad: label some of your own, and `winnow reward eval --labelled` says how likely one at each",
        "percentile is acceptable.",
        "",
        "| percentile | 5 | 20 | 50 | 80 | 95 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| reward | " + " | ".join(f"{scale.at_percentile(p) or 0.0:.2f}" for p in (5, 20, 50, 80, 95)) + " |",
        "",
        f"Prompt and completion may be {manifest.max_length} tokens together; longer prompts lose their beginning.",
        "",
        "## Training",
        "",
        f"{training['prompts']} prompts, seed {training['seed']}. Pairs by source: "
        + ", ".join(f"{source} {count}" for source, count in training["pairs"].items())
        + ".",
        "",
        "| file | SHA-256 |",
        "| --- | --- |",
    ]
    for entry in [*training["data"], *training["validation_data"], *training["gate_data"]]:
        lines.append(f"| {entry['file']} | `{entry['sha256'][:16]}…` |")
    lines += _data_and_licences(card)
    lines += [
        "",
        "## Limits",
        "",
        "It has learnt what these annotators preferred on these prompts, not what is true or safe. Far from its",
        "training data its numbers mean little, and choosing the best of very many candidates finds its mistakes",
        "(Gao et al., arXiv 2210.10760). Measure it on your own comparisons: `winnow reward eval`.",
        "",
    ]
    return "\n".join(lines)


def _scale(manifest: Manifest) -> str:
    """What the served rewards' zero and unit are."""
    scale, references = manifest.normalisation, f"{manifest.num_references} reference completions"
    if manifest.objectives:
        return f"Served rewards are in the deviations of the objectives above; percentiles are among {references}."
    return (
        f"Served rewards have mean 0 and deviation 1 over {references} "
        f"(raw mean {scale.mean:.3f}, deviation {scale.std:.3f})."
    )


def _objectives(manifest: Manifest) -> list[str]:
    """Of a model with several: what each is good for, and how they become one reward."""
    rule = manifest.rule
    if rule is None:
        return []
    parting = f"{LEAST_ACCEPTED:.0f}"
    total = sum(rule.weights.values())
    wanted = " + ".join(f"{weight / total:.2g} × {name}" for name, weight in rule.weights.items())
    rows = []
    for name, about in manifest.objectives.items():
        own, floor = about.accuracy, rule.floors.get(name)
        shown = "–" if own is None else f"{own.accuracy:.1%} of {own.pairs} ({own.low:.1%} – {own.high:.1%})"
        least = "–" if floor is None else f"{floor:.2f}"
        rows.append(f"| {name} | {', '.join(about.sources)} | {shown} | {about.num_references} | {least} |")
    return [
        "",
        "It has a head for each of several objectives, each on a scale of its own: mean 0 and deviation 1 over the",
        f"references of its sources. The one reward is {wanted}, among completions that reach every floor; whatever",
        f"misses one has less than {parting}, all others more: `min_reward: {parting}` refuses it.",
        "",
        "| objective | sources | its own held-out accuracy | references | floor |",
        "| --- | --- | --- | ---: | ---: |",
        *rows,
    ]


def _data_and_licences(card: Mapping[str, Any]) -> list[str]:
    """What the configuration says of the weights', the data's and the base's origin; nothing where it is silent."""
    origins = {**card.get("sources", {}), **({"the base": card["base"]} if card.get("base") else {})}
    paragraphs = [f"The weights are licensed under {card['licence']}."] if card.get("licence") else []
    if origins:
        rows = [f"| {name} | {origin} |" for name, origin in origins.items()]
        paragraphs.append("\n".join(["| what | from, licence |", "| --- | --- |", *rows]))
    paragraphs += card.get("notes", [])
    return ["", "## Data and licences", "", "\n\n".join(paragraphs)] if paragraphs else []
