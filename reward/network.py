"""The networks: a backbone, pooled hidden states, a scalar head; and the padded batches they take.

Positions come from lengths, never from token ids: transformers' own classification heads look for the
first pad token, and where pad = EOS they read the score one token early.

Shapes: B sequences, T tokens, H hidden width, D = H × poolings × layers, E domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from reward.devices import sent
from reward.ensembles import EnsembleHead, ManyHeads
from reward.errors import ModelLoadError
from reward.manifest import Head, Pooling
from reward.objective_head import ObjectivesHead
from reward.rendering import Rendered


class PromptGated(nn.Module):
    """A head that sees the prompt too: its last token and its mean."""

    heading: int = 0
    """Tokens at the prompt's end that it overlooks: the heading of the assistant's turn."""


class GatedHead(PromptGated):
    """A linear head for each of E domains, mixed by a softmax gate on the prompt.

    reward = Σ_e softmax(G p)_e · (w_e · x + b_e), after ArmoRM (arXiv 2406.12845, section 3.2). The gate sees
    the prompt alone, so all completions of a prompt are weighed alike and none can talk its way to another head.
    """

    def __init__(self, width: int, prompt_width: int, num_domains: int) -> None:
        super().__init__()
        self.experts = nn.Linear(width, num_domains)
        self.gate = nn.Linear(prompt_width, num_domains)

    def forward(self, pooled: Tensor, prompt: Tensor) -> Tensor:
        """`pooled` (B, D) and `prompt` (B, P) -> (B, 1)."""
        shares = self.gate(prompt).softmax(dim=-1)  # (B, E)
        return cast(Tensor, (self.experts(pooled) * shares).sum(dim=-1, keepdim=True))


AnyHead = nn.Linear | nn.Sequential | PromptGated | ManyHeads


class PooledRewardModel(nn.Module):
    """Backbone, pooled hidden states, a linear or gated head, or several.

    `layers` as in `Head`: the head sees the poolings of each, layer after layer; a gate sees the last one's.
    Raises `ModelLoadError` for several layers of a base whose final norm cannot be told.
    """

    def __init__(
        self, backbone: nn.Module, head: AnyHead, pooling: Sequence[Pooling], layers: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.pooling = tuple(pooling)
        self.earlier_layers = list(layers[:-1])
        if self.earlier_layers:
            final_norm(backbone)

    def forward(self, batch: Sequences, *, by_head: bool = False) -> Tensor:
        """Raw rewards (B,), in fp32. `by_head`: of each head by itself, (B, K); of a single one, (B, 1)."""
        hidden = self._hidden_states(batch)
        asked = pool_prompt(hidden[-1], batch, self.head.heading) if isinstance(self.head, PromptGated) else None
        rewards = self.apply_heads(self._pooled(hidden, batch), asked)
        return rewards if by_head else self.combine(rewards)

    def apply_heads(self, pooled: Tensor, prompt: Tensor | None) -> Tensor:
        """What heads see -> raw rewards of each head (B, K), in fp32. Only a gate looks at `prompt`."""
        number = next(self.head.parameters()).dtype
        seen = (pooled,) if prompt is None else (pooled, prompt)
        return cast(Tensor, self.head(*(tensor.to(number) for tensor in seen))).float()

    def combine(self, rewards: Tensor) -> Tensor:
        """The one reward of each completion: (B, K) of the heads -> (B,)."""
        return self.head.combine(rewards) if isinstance(self.head, ManyHeads) else rewards.squeeze(-1)

    def features(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        """What heads see, in fp32: the completion's (B, D) and the prompt's (B, 2H)."""
        hidden = self._hidden_states(batch)
        return self._pooled(hidden, batch), pool_prompt(hidden[-1], batch)

    def read(self, **inputs: Any) -> list[Tensor]:
        """(B, T, H) of each layer that is read, the last one last, all after the final norm: of one scale.

        `inputs`: whatever the backbone takes.
        """
        if not self.earlier_layers:
            return [self.backbone(**inputs).last_hidden_state]
        # A list has only these kept; transformers that do not know lists yet keep every layer's, at the same places.
        output = self.backbone(**inputs, output_hidden_states=self.earlier_layers)
        norm = final_norm(self.backbone)
        return [*(norm(output.hidden_states[layer]) for layer in self.earlier_layers), output.last_hidden_state]

    def _hidden_states(self, batch: Sequences) -> list[Tensor]:
        """(B, T, H) of each layer that is read, for each sequence."""
        return [batch.by_completion(states) for states in self.read(**batch.inputs())]

    def _pooled(self, hidden: Sequence[Tensor], batch: Sequences) -> Tensor:
        """(B, D) in fp32: the poolings of each layer, layer after layer."""
        masks = batch.attention_mask, batch.completion_mask
        return torch.cat([pool(states, *masks, self.pooling) for states in hidden], dim=-1)


class ClassifierRewardModel(nn.Module):
    """A whole sequence classifier whose head cannot be told from its backbone (BERT-like encoders)."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, batch: Batch, *, by_head: bool = False) -> Tensor:
        """Raw rewards (B,), in fp32. `by_head`: of the single head there is, (B, 1)."""
        rewards = cast(Tensor, self.classifier(**batch.inputs()).logits).float()
        return rewards if by_head else self.combine(rewards)

    def combine(self, rewards: Tensor) -> Tensor:
        """The one reward of each completion: (B, 1) -> (B,)."""
        return rewards.squeeze(-1)


class Sequences(Protocol):
    """What a pooled network takes. B completions with their prompts, T tokens."""

    @property
    def attention_mask(self) -> Tensor:
        """(B, T) 1 for tokens, 0 for padding on the right."""

    @property
    def completion_mask(self) -> Tensor:
        """(B, T) True for the completion's tokens."""

    def inputs(self) -> dict[str, Tensor]:
        """Of the backbone."""

    def by_completion(self, hidden: Tensor) -> Tensor:
        """The backbone's hidden states as (B, T, H)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded sequences. B sequences, T tokens."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T) 1 for tokens, 0 for padding
    completion_mask: Tensor  # (B, T) True for the completion's tokens
    token_type_ids: Tensor | None = None  # (B, T)

    def inputs(self) -> dict[str, Tensor]:
        """What every transformers backbone takes."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return inputs if self.token_type_ids is None else {**inputs, "token_type_ids": self.token_type_ids}

    def by_completion(self, hidden: Tensor) -> Tensor:
        """As they are: a row is a completion with its prompt."""
        return hidden


def collate(items: Sequence[Rendered], device: torch.device) -> Batch:
    """Pads on the right with id 0; what stands in the padding never reaches a score."""
    lengths = torch.tensor([len(item) for item in items])
    width = int(lengths.max())
    starts = torch.tensor([item.completion_start for item in items])
    positions = torch.arange(width)
    attention = positions < lengths[:, None]  # (B, T)
    completion = attention & (positions >= starts[:, None])

    def padded(rows: list[list[int]]) -> Tensor:
        return sent(torch.tensor([row + [0] * (width - len(row)) for row in rows]), device)

    types = [item.token_type_ids for item in items if item.token_type_ids is not None]
    return Batch(
        padded([item.ids for item in items]),
        sent(attention.long(), device),
        sent(completion, device),
        padded(types) if len(types) == len(items) else None,
    )


def pool(hidden: Tensor, attention_mask: Tensor, completion_mask: Tensor, pooling: Sequence[Pooling]) -> Tensor:
    """Concatenated poolings of `hidden` (B, T, H) -> (B, H × len(pooling)), in fp32.

    `last` takes the last token by the attention mask (right padding), `mean` averages the completion's tokens.
    """
    hidden = hidden.float()
    parts = []
    for kind in pooling:
        if kind == "last":
            ends = (attention_mask.sum(dim=1) - 1).clamp(min=0)  # (B,)
            parts.append(hidden[torch.arange(hidden.shape[0], device=hidden.device), ends])
        else:
            kept = completion_mask.unsqueeze(-1)  # (B, T, 1)
            # where(), not a product: what the backbone computed for padding may be NaN.
            total = torch.where(kept, hidden, 0.0).sum(dim=1)
            parts.append(total / kept.sum(dim=1).clamp(min=1))
    return torch.cat(parts, dim=-1)


def pool_prompt(hidden: Tensor, batch: Sequences, heading: int = 0) -> Tensor:
    """What a gate sees of the prompt: its last token and its mean, (B, 2H) in fp32; zeros for an empty prompt."""
    mask = without_heading(batch.attention_mask.bool() & ~batch.completion_mask, heading)
    pooled = pool(hidden, mask, mask, ("last", "mean"))
    return torch.where(mask.any(dim=1, keepdim=True), pooled, 0.0)


def without_heading(prompt: Tensor, heading: int) -> Tensor:
    """The mask `prompt` (B, T) without its last `heading` tokens."""
    return prompt & (prompt.flip(-1).cumsum(dim=-1).flip(-1) > heading) if heading else prompt


def load_backbone(base: str, head: Head, **arguments: Any) -> nn.Module:
    """The base without its language-model head, cut to `head.num_layers` layers; the final norm stays."""
    from transformers import AutoModel

    extra = {} if head.num_layers is None else {"num_hidden_layers": head.num_layers}
    backbone, info = AutoModel.from_pretrained(base, output_loading_info=True, **extra, **arguments)
    # An encoder's own pooler is often not in the checkpoint, and is not used here.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ModelLoadError(f"{base} does not hold {', '.join(missing[:3])}: these weights would be random")
    return cast(nn.Module, backbone)


_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
"""What decoders of transformers call it."""


def final_norm(backbone: nn.Module) -> nn.Module:
    """What a decoder applies to its last layer's hidden states. Raises `ModelLoadError` where it cannot be told."""
    for name in _FINAL_NORMS:
        norm = getattr(backbone, name, None)
        if isinstance(norm, nn.Module):
            return norm
    raise ModelLoadError(
        f"several layers cannot be read from {type(backbone).__name__}: it has none of the final norms known here "
        f"({', '.join(_FINAL_NORMS)})"
    )


def hidden_size(backbone: nn.Module) -> int:
    """Width of the backbone's hidden states."""
    return int(cast(Any, backbone).config.hidden_size)


def build_head(width: int, head: Head) -> AnyHead:
    """An untrained head for hidden states of `width`.

    Linear heads start at N(0, 1/(d+1)) without offset, as Ziegler et al. (arXiv 1909.08593) start theirs.
    """
    inputs = width * len(head.pooling) * max(len(head.layers), 1)
    if head.domains:
        return GatedHead(inputs, 2 * width, len(head.domains))
    linear = nn.Linear(inputs, len(head.objectives) or head.heads)
    nn.init.normal_(linear.weight, std=(inputs + 1) ** -0.5)
    nn.init.zeros_(linear.bias)
    if head.objectives:
        return ObjectivesHead(linear)
    if head.heads == 1:
        return linear
    return EnsembleHead(linear, head.aggregate, head.std_coefficient)


def wrap_classifier(classifier: nn.Module) -> PooledRewardModel | ClassifierRewardModel:
    """Decoders keep their head in `score`: it is applied to positions of our own. Encoders run whole.

    Raises `ModelLoadError` for others: how they find the token to score is theirs, and padding could mislead them.
    """
    config = cast(Any, classifier).config
    score = getattr(classifier, "score", None)
    backbone = getattr(classifier, str(getattr(classifier, "base_model_prefix", "")), None)
    if isinstance(score, nn.Linear) and isinstance(backbone, nn.Module):
        return PooledRewardModel(backbone, score, ("last",))
    if score is not None or config.is_encoder_decoder or not hasattr(classifier, "classifier"):
        raise ModelLoadError(
            f"{type(classifier).__name__} has a head of a kind not known here: decoders with a linear `score` and "
            "encoders with a `classifier` can be loaded"
        )
    return ClassifierRewardModel(classifier)


def batches_by_length(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Positions in batches of similar length, longest first, within `max_batch_tokens` padded tokens each."""
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and longest * (len(batches[-1]) + 1) <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = lengths[index]
    return batches
