"""Where a network lives while it is trained: whole in each process (DDP), or spread over them (FSDP2).

FSDP2 is torch's `fully_shard`, over gloo on CPUs as over NCCL on GPUs. accelerate's own FSDP is not used: on CPUs it
trains unsharded and says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from reward.devices import exact_dtype
from training.options import OptionsError

ItemT = TypeVar("ItemT")
PartT = TypeVar("PartT")

Sharding = Literal["none", "fsdp2"]


@dataclass(frozen=True, slots=True)
class Placement:
    """A network in its place."""

    accelerator: Accelerator
    network: Any
    """To call where gradients are wanted."""
    plain: Any
    """To call where none are: without DDP's wrapper, which would wait for processes that have nothing to do."""
    is_sharded: bool
    """Each call is one of all processes together: all must make as many."""

    def portions(
        self, items: Sequence[ItemT], split: Callable[[Sequence[ItemT]], Sequence[PartT]]
    ) -> list[tuple[PartT, float]]:
        """This process's micro-batches of `items` with what they count for: 1, or 0 for those only made to take part.

        `split` cuts one process's share into micro-batches. There is always one at least.
        """
        processes = self.accelerator.num_processes
        rank = self.accelerator.process_index
        mine: list[tuple[PartT, float]] = [(part, 1.0) for part in split(items[rank::processes])]
        wanted = max(len(split(items[each::processes])) for each in range(processes)) if self.is_sharded else 1
        idle = wanted - len(mine)
        return mine + [(split(items[:1])[0], 0.0)] * idle

    def added_up(self, totals: Tensor) -> list[float]:
        """Sums over all processes, number by number."""
        summed: Any = self.accelerator.reduce(totals.detach().to(exact_dtype(totals.device)), reduction="sum")
        numbers: list[float] = summed.tolist()
        return numbers


def place(accelerator: Accelerator, model: nn.Module, sharding: Sharding) -> Placement:
    """Moves the model to its device and makes it ready for training in all processes.

    Optimizers are built afterwards, from the model's parameters. Raises `OptionsError` when nothing could be sharded.
    """
    if sharding == "none":
        network = accelerator.prepare(model)
        return Placement(accelerator, network, accelerator.unwrap_model(network), is_sharded=False)
    shard(model, accelerator)
    return Placement(accelerator, model, model, is_sharded=True)


def require_shardable(accelerator: Accelerator, sharding: Sharding) -> None:
    """Raises `OptionsError` for a launch or a precision that sharding does not go with."""
    if sharding == "none":
        return
    if accelerator.num_processes == 1:
        raise OptionsError("sharding: fsdp2 spreads a model over several processes, and this is one: use torchrun")
    if accelerator.mixed_precision == "fp16":
        raise OptionsError("mixed_precision: fp16 does not go with sharding: fsdp2; use bf16")


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Spreads a model over the devices of all processes, a layer at a time: on none of them it stands whole.

    Raises `OptionsError` when nothing could be sharded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    require_shardable(accelerator, "fsdp2")
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if accelerator.mixed_precision == "bf16" else None, reduce_dtype=torch.float32
    )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in [module for module in model.modules() if type(module).__name__ in _layer_names(model)]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # Resharded after a pass without gradients too: else whole weights would stand among the parameters.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if hasattr(model, "peft_config"):
        # PEFT generates by the model within, past what gathers the weights on a call of its own.
        register_fsdp_forward_method(model, "generate")
    if not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise OptionsError("sharding: fsdp2 left some weights of this model unsharded")


def _layer_names(model: Any) -> frozenset[str]:
    """Classes of the layers that are gathered one at a time; empty where the model does not say."""
    return frozenset(name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ())


@contextmanager
def whole_weights(model: Any) -> Iterator[None]:
    """Inside, a sharded model stands whole in each process, which may make as many passes through it as it needs.

    All processes must enter, each after a first pass through the model. A whole model is left as it is.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not shards:
        yield
        return
    model.set_reshard_after_forward(False)
    for module in shards:
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
        model.set_reshard_after_forward(True)


def in_step(parts: Sequence[PartT], spare: PartT, *, is_sharded: bool) -> Iterator[tuple[PartT, bool]]:
    """A process's own micro-batches and whether each counts: where models are sharded, as many as any process has.

    Those that are made up for are `spare`. All processes must call it alike. `Placement.portions` does the same where
    each knows what the others have.
    """
    wanted = max(gather_object([len(parts)])) if is_sharded else len(parts)
    yield from ((part, True) for part in parts)
    yield from ((spare, False) for _ in range(wanted - len(parts)))


def add_up_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """The sum over all processes of what each has added to its gradients, of a whole model or a sharded one.

    A whole model's go as one buffer; a process that had nothing to do may have none.
    """
    if accelerator.num_processes == 1 or not parameters:
        return
    if isinstance(parameters[0], DTensor):
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(accelerator.num_processes)  # FSDP has averaged
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    whole: Any = accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), reduction="sum")
    for parameter, total in zip(parameters, torch.split(whole, [grad.numel() for grad in grads]), strict=True):
        parameter.grad = total.view_as(parameter)


def gathered(value: Any, *, keep: bool = True) -> Any:
    """Nested containers with each shard put together, on the CPU. All processes must call it alike.

    `keep`: a process that does not want them lets go of whole tensors one by one, and has None in their places.
    """
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(value, Mapping):
        return {key: gathered(member, keep=keep) for key, member in value.items()}
    if isinstance(value, list):
        return [gathered(member, keep=keep) for member in value]
    return value


def scattered(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as a shard of the kind that `like` is; as it is where `like` is whole."""
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def scattered_optimizer_state(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state as `gathered` gave it, for `optimizer.load_state_dict`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    members = {
        number: {
            name: scattered(value, parameters[number]) if isinstance(value, Tensor) and value.ndim else value
            for name, value in own.items()
        }
        for number, own in state["state"].items()
    }
    return {**state, "state": members}
