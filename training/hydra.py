"""A language model cut in two: a frozen trunk that is run once, and top layers that are trained on its output.

What trlx called hydra (`num_layers_unfrozen`): policy and reference share the trunk and have a top each, so that one
pass through most of the model serves rollout, reference and every epoch of updates.

Shapes: B rows, T tokens, H hidden width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.options import OptionsError

TOLERANCE = 1e-3
"""How far the two halves may be off the whole, in logits, on the tokens they are tried with."""
_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm")


@dataclass(frozen=True, slots=True)
class Hydra:
    """The parts of one model. `top` holds the model's own last layers: training it trains the model."""

    trunk: Any
    """`trunk(input_ids=…)` gives the hidden states (B, T, H) below the top layers."""
    top: Any
    """A language model that takes them as `inputs_embeds`."""
    reference_top: Any
    """The same, as it was before training."""

    def below(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """(B, T, H), without gradients."""
        with torch.no_grad():
            output = self.trunk(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            )
        return cast(Tensor, output.last_hidden_state)


def split(model: Any, top_layers: int) -> Hydra:
    """Cuts a causal language model below its last `top_layers` layers; only those keep gradients.

    The whole model still works, with the trained layers in it. Raises `OptionsError` for one that cannot be cut: its
    layers are not where they are looked for, or the halves do not add up to the whole.
    """
    name = str(getattr(model, "base_model_prefix", ""))
    decoder = getattr(model, name, None)
    layers = getattr(decoder, "layers", None)
    norm = next((norm for norm in _FINAL_NORMS if isinstance(getattr(decoder, norm, None), nn.Module)), None)
    if not isinstance(layers, nn.ModuleList) or norm is None:
        raise OptionsError(f"top_layers: {type(model).__name__} cannot be cut; choose tuning: lora or full")
    if not 0 < top_layers < len(layers):
        raise OptionsError(f"top_layers: must be from 1 to {len(layers) - 1} for this model, not {top_layers}")
    trunk = _with(decoder, layers=nn.ModuleList(layers[:-top_layers]), **{norm: nn.Identity()})
    tops = list(layers[-top_layers:])
    # In evaluation mode for good: what is done to the model afterwards does not reach copies.
    before = [copy.deepcopy(layer).eval() for layer in tops]
    model.requires_grad_(False)
    for layer in tops:
        layer.requires_grad_(True)
    for layer in before:
        layer.requires_grad_(False)
    hydra = Hydra(
        trunk,
        top=_with(model, **{name: _top_of(decoder, tops)}),
        reference_top=_with(model, **{name: _top_of(decoder, before)}),
    )
    _require_whole(model, hydra)
    return hydra


def _with(module: Any, **parts: nn.Module) -> Any:
    """The same module, weights and all, with other parts under these names."""
    changed = copy.copy(module)
    changed._modules = dict(module._modules)
    for name, part in parts.items():
        setattr(changed, name, part)
    return changed


def _top_of(decoder: Any, layers: list[nn.Module]) -> Any:
    """The decoder with these last layers of its own only."""
    top = _with(decoder, layers=nn.ModuleList(layers))
    kinds = getattr(decoder.config, "layer_types", None)
    if kinds:
        # What each layer sees, such as a sliding window, is looked up by its place among those that there are.
        top.config = copy.deepcopy(decoder.config)
        top.config.num_hidden_layers = len(layers)
        top.config.layer_types = list(kinds)[-len(layers) :]
    return top


@torch.no_grad()
def _require_whole(model: Any, hydra: Hydra) -> None:
    """Raises `OptionsError` unless trunk and top give the model's own logits, with padding before one row."""
    device = next(model.parameters()).device
    ids = torch.arange(24, device=device).view(2, 12) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    told = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    was_training = model.training
    model.eval()
    try:
        whole = model(input_ids=ids, **told).logits
        for top in (hydra.top, hydra.reference_top):
            halves = top(inputs_embeds=hydra.below(ids, mask, positions), **told).logits
            if (whole - halves)[mask.bool()].abs().max() > TOLERANCE * whole[mask.bool()].abs().max():
                raise OptionsError(
                    f"top_layers: {type(model).__name__} does more between its layers than can be cut; choose tuning: "
                    "lora or full"
                )
    except (TypeError, RuntimeError, AttributeError) as error:
        raise OptionsError(f"top_layers: {type(model).__name__} cannot be cut ({error})") from error
    finally:
        model.train(was_training)
