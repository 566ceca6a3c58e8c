"""A reward model in this process: load, check, run. What it looks like on disk is `loading.py`'s."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError

from reward.bases import quiet_loading
from reward.batching import BatchingOptions
from reward.compiling import compile_blocks, warm_up
from reward.devices import choose_device, choose_dtype
from reward.ensembles import EnsembleHead
from reward.errors import InputError, ModelLoadError
from reward.loading import Loading
from reward.manifest import FILE_NAME, Aggregate, Head, Manifest, Probe, load_manifest
from reward.network import ClassifierRewardModel, PooledRewardModel, batches_by_length, collate
from reward.normalisation import Normalisation
from reward.objective_head import ObjectivesHead
from reward.objectives import ObjectiveChoice, rule_for
from reward.rendering import Rendered, Renderer, Template
from reward.scorer import RawScore
from reward.shared_prefix import SharingOptions, share_prefix, take_sharing
from reward.shared_prefix_model import SharedPrefixModel, find_way

DEFAULT_REWARD_MODEL = "default"
"""The reward model that ships with winnow."""
REFERENCES_FILE = "references.safetensors"
"""Of a model with several objectives: `rewards`, (references, objectives), as the heads gave them."""
MAX_LENGTH_CAP = 4096
"""Default limit of prompt and completion in tokens for models without `reward.json`, if the model allows more."""

_DAMAGED = (
    OSError, ValueError, TypeError, AttributeError, LookupError, ImportError, RuntimeError, SafetensorError, InputError
)  # fmt: skip
"""What is missing from files of others, or has another shape in them, shows as any of these."""

PROBE_TOLERANCE = 1e-3
HALF_PRECISION_PROBE_TOLERANCE = 0.1
"""How far a stored probe may be off on load, in deviations of the raw reward, in fp32 and in bf16 or fp16."""


@dataclass(slots=True)
class RewardModel:
    """A loaded reward model: network, renderer and what is known of it."""

    network: PooledRewardModel | ClassifierRewardModel
    renderer: Renderer
    manifest: Manifest
    device: torch.device
    dtype: torch.dtype
    sharing: SharedPrefixModel | None = None
    """Scores sequences that share a prefix, where the model can."""

    def shared(self, items: Sequence[Rendered], *, remember: bool = False) -> list[Rendered]:
        """The completions of one prompt, marked to be scored with that encoded once, where it can be and pays.

        `remember`: more may come for this prompt, so it is worth keeping behind a single completion, too.
        """
        if self.sharing is None:
            return list(items)
        return share_prefix(items, self.sharing.cache_tokens if remember else 0)

    def take_batch(self, items: Sequence[Rendered], options: BatchingOptions) -> list[int]:
        """Which of the waiting items go best together: indices, the first always among them."""
        return take_sharing(items, options, one_request=self.sharing is None or self.sharing.way == "expanded")

    @torch.inference_mode()
    def raw_scores(self, items: Sequence[Rendered]) -> list[RawScore]:
        """One forward pass over all items. Raises ValueError on a reward that is not finite."""
        if self.sharing is not None and all(item.prefix is not None for item in items):
            by_head = self.sharing.raw_rewards(items, by_head=True)
        else:
            by_head = self.network(collate(items, self.device), by_head=True)
        rewards = self.network.combine(by_head)
        if not bool(torch.isfinite(by_head).all() and torch.isfinite(rewards).all()):
            raise ValueError("the reward model gave a reward that is not finite")
        heads = by_head.tolist() if by_head.shape[1] > 1 else [()] * len(items)
        return [RawScore(reward, tuple(own)) for reward, own in zip(rewards.tolist(), heads, strict=True)]

    def raw_rewards(self, items: Sequence[Rendered]) -> list[float]:
        """As `raw_scores`, the one number only."""
        return [raw.reward for raw in self.raw_scores(items)]

    def score_all(
        self,
        items: Sequence[Rendered],
        max_batch_tokens: int | None = None,
        on_progress: Callable[[int], None] = lambda count: None,
    ) -> list[float]:
        """As `raw_scores_of_all`, the one number only."""
        return [raw.reward for raw in self.raw_scores_of_all(items, max_batch_tokens, on_progress)]

    def raw_scores_of_all(
        self,
        items: Sequence[Rendered],
        max_batch_tokens: int | None = None,
        on_progress: Callable[[int], None] = lambda count: None,
    ) -> list[RawScore]:
        """Raw scores of any number of items, in order, for offline work.

        Batches are of one prompt (`shared`) or of similar length.
        """
        scores: dict[int, RawScore] = {}
        options = BatchingOptions(max_batch_tokens=max_batch_tokens).on_device(self.device.type)
        for batch in self._batches(items, options):
            scores.update(zip(batch, self.raw_scores([items[i] for i in batch]), strict=True))
            on_progress(len(batch))
        return [scores[index] for index in range(len(items))]

    def _batches(self, items: Sequence[Rendered], options: BatchingOptions) -> Iterator[list[int]]:
        assert options.max_batch_tokens is not None, "filled in for the device"
        alone = [index for index, item in enumerate(items) if item.prefix is None]
        for batch in batches_by_length([len(items[index]) for index in alone], options.max_batch_tokens):
            yield [alone[place] for place in batch]
        sharing = (index for index, item in enumerate(items) if item.prefix is not None)
        window: list[int] = []
        while window := [*window, *islice(sharing, 4 * options.max_batch_size - len(window))]:
            taken = set(self.take_batch([items[index] for index in window], options))
            yield [index for place, index in enumerate(window) if place in taken]
            window = [index for place, index in enumerate(window) if place not in taken]


def load_reward_model(
    source: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    aggregate: Aggregate | None = None,
    objectives: ObjectiveChoice | None = None,
    sharing: SharingOptions | None = None,
    compiled: bool = False,
) -> RewardModel:
    """Loads and checks a reward model.

    `source`: a folder, a hub id, or `default`; `aggregate`: the rule of an ensemble, its own if None; `objectives`: the
    same of a model with several objectives. Raises `ModelLoadError` when weights of the head are missing, the model has
    more than one label, a stored probe scores differently, or there is nothing that such a rule could be for;
    `reward.devices.DeviceError` for a device or dtype that does not exist here.
    """
    folder = default_folder() if source == DEFAULT_REWARD_MODEL else Path(source).expanduser()
    if source == DEFAULT_REWARD_MODEL and not (folder / FILE_NAME).is_file():
        raise ModelLoadError(f"{folder} holds no reward model: this copy of winnow came without one; name another")
    place = choose_device(device)
    number = choose_dtype(dtype, place)
    manifest = load_manifest(folder) if folder.is_dir() else None
    loading = Loading(place, number, trust_remote_code)
    try:
        with quiet_loading():
            network: PooledRewardModel | ClassifierRewardModel
            if manifest is not None and manifest.head.kind == "pooled":
                network, tokenizer = loading.pooled(folder, manifest)
            else:
                name = str(folder) if folder.is_dir() else source
                num_layers = manifest.head.num_layers if manifest else None
                network, tokenizer = loading.sequence_classification(name, num_layers)
                manifest = manifest or _bare_manifest(source, network, tokenizer)
        renderer = Renderer(tokenizer, manifest.template, manifest.max_length)
    except _DAMAGED as error:
        what = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
        raise ModelLoadError(f"cannot load the reward model {source!r}: {what}") from error
    network.to(device=place).eval().requires_grad_(False)
    if manifest.rule is not None:
        cast(ObjectivesHead, network.head).follow(manifest.rule, manifest.objective_scales)
    model = RewardModel(network, renderer, manifest, place, number)
    if compiled:
        compile_blocks(model, source)
    check_probes(model, source)
    if aggregate is not None:
        _with_rule(model, aggregate, source)
    if objectives is not None:
        _with_objectives(model, objectives, folder)
    sharing = sharing or SharingOptions()
    if sharing.mode == "auto" and isinstance(network, PooledRewardModel):
        model.sharing = find_way(network, renderer, place, cache_tokens=sharing.cache_tokens)
    if compiled:
        warm_up(model)
    return model


def _with_rule(model: RewardModel, rule: Aggregate, source: str) -> None:
    """Puts the ensemble under another rule than its own, with that rule's scale."""
    manifest, head = model.manifest, getattr(model.network, "head", None)
    if not isinstance(head, EnsembleHead):
        raise ModelLoadError(f"{source}: aggregate {rule!r} is for a reward model with several heads; this has one")
    scale = manifest.scales.get(rule)
    if scale is None:
        raise ModelLoadError(f"{source}: reward.json holds no scale for aggregate {rule!r}")
    head.rule = rule
    model.manifest = replace(manifest, head=replace(manifest.head, aggregate=rule), normalisation=scale)


def _with_objectives(model: RewardModel, choice: ObjectiveChoice, folder: Path) -> None:
    """Puts a model with several objectives under another rule, with that rule's percentiles."""
    from safetensors.torch import load_file

    manifest, head = model.manifest, getattr(model.network, "head", None)
    if manifest.rule is None or not isinstance(head, ObjectivesHead):
        raise ModelLoadError(f"{folder}: floors and objective_weights are for a reward model with several objectives")
    scales = manifest.objective_scales
    try:
        rule = rule_for(choice, scales, manifest.rule)
        references = load_file(folder / REFERENCES_FILE)["rewards"]
    except ValueError as error:
        raise ModelLoadError(f"{folder}: {error}") from error
    except (OSError, KeyError, SafetensorError) as error:
        raise ModelLoadError(
            f"{folder / REFERENCES_FILE} is missing or damaged: percentiles under another rule are made from it"
        ) from error
    head.follow(rule, scales)
    normalisation = Normalisation.with_quantiles_of(head.combine(references).tolist())
    model.manifest = replace(manifest, rule=rule, normalisation=normalisation)


def default_folder() -> Path:
    """Where the shipped reward model lies."""
    return Path(__file__).parent / "default"


def check_probes(model: RewardModel, source: str) -> None:
    """Scores the manifest's probe texts; without any, one text, to see that the model scores at all.

    Raises `ModelLoadError` when it does not, or when a probe differs from what is stored.
    """
    tolerance = PROBE_TOLERANCE if model.dtype == torch.float32 else HALF_PRECISION_PROBE_TOLERANCE
    scales = [objective.normalisation for objective in model.manifest.objectives.values()]
    for number, probe in enumerate(model.manifest.probes or (_ANY_TEXT,)):
        try:
            (raw,) = model.raw_scores([model.renderer.render(probe.prompt, probe.completion)])
        except (InputError, ValueError, IndexError, RuntimeError) as error:
            # A tokenizer with more tokens than the base, or a head of another width, among others.
            raise ModelLoadError(f"{source}: scoring a probe text failed: {error}") from error
        if not model.manifest.probes:
            continue
        # Head by head where there are several objectives: what is made of them jumps where a floor is near.
        found, stored = ([raw.reward], [probe.raw_reward]) if not scales else (raw.by_head, probe.by_head)
        for reward, expected, scale in zip(found, stored, scales or [model.manifest.normalisation], strict=True):
            allowed = tolerance * max(scale.std, 1e-6)
            if abs(reward - expected) > allowed:
                raise ModelLoadError(
                    f"{source}: probe {number} scores {reward:.4f}, but {expected:.4f} is stored in reward.json "
                    f"(tolerance {allowed:.4g}): the head, the base ({model.manifest.base}) or the tokenizer is not "
                    "the one this model was saved with"
                )


_ANY_TEXT = Probe([{"role": "user", "content": "Hello"}], [{"role": "assistant", "content": "Hi!"}], 0.0)


def choose_template(tokenizer: Any, *, is_encoder: bool) -> Template:
    """`chat` where the tokenizer has a chat template, `pair` for encoders, else `plain`."""
    if tokenizer.chat_template:
        return "chat"
    return "pair" if is_encoder else "plain"


def choose_max_length(config: Any, tokenizer: Any) -> int:
    """The longest input the model was made for, at most `MAX_LENGTH_CAP`."""
    limits = [MAX_LENGTH_CAP, tokenizer.model_max_length]
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None:
        # RoBERTa-like models count positions from pad_token_id + 1.
        offset = (config.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
        limits.append(positions - offset)
    return int(min(limits))


def _bare_manifest(source: str, network: PooledRewardModel | ClassifierRewardModel, tokenizer: Any) -> Manifest:
    """For published models without `reward.json`: raw rewards, template and length by the model's own files."""
    is_encoder = isinstance(network, ClassifierRewardModel)
    config = network.classifier.config if isinstance(network, ClassifierRewardModel) else network.backbone.config
    return Manifest(
        name=Path(source).name,
        base=source,
        head=Head(),
        template=choose_template(tokenizer, is_encoder=is_encoder),
        max_length=choose_max_length(config, tokenizer),
    )
