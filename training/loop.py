"""The gradient steps that trainers share: optimizer, schedule, accumulation over micro-batches and processes."""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from reward.devices import DeviceError, choose_device
from training.options import OptionsError, StepOptions

_WORLD_SIZES = frozenset({"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"})
"""Where launchers write the number of processes."""


def start_accelerator(options: StepOptions, *, frozen: bool = False) -> Accelerator:
    """An accelerator on the device asked for. Raises `OptionsError` when it is not what the launcher promised.

    `frozen`: no gradients go through most of the model, so that bf16 suits CPUs that compute in it, too.
    """
    try:
        device = choose_device(options.device)
    except DeviceError as error:
        raise OptionsError(f"device: {error}") from error
    precision = options.mixed_precision
    if precision == "auto":
        precision = "bf16" if _computes_in_bf16(device, frozen=frozen) else "no"
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise OptionsError(
                f"{variable} asks for sharding by accelerate, which does without it on some devices and says nothing: "
                "start with torchrun, and set sharding: fsdp2 where the trainer has it"
            )
    if AcceleratorState._shared_state and AcceleratorState._shared_state.get("_mixed_precision") != precision:
        # It is one for the whole process; the trainers of a loop follow each other, each with a precision of its own.
        AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    except ValueError as error:
        raise OptionsError(f"the launch cannot work: {error}") from error
    _check_launch(accelerator)
    if accelerator.num_processes > 1 and device.type == "cpu":
        # Left to the end of the process, gloo's threads may outlive what they work on, and abort it.
        atexit.unregister(_leave_group)
        atexit.register(_leave_group)
    return accelerator


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _computes_in_bf16(device: torch.device, *, frozen: bool) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # CPUs with bf16 matrix units pass a frozen base 2.5 times as fast in it, those with AVX-512's dot products of bf16
    # 1.7 times; all others several times slower.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    computes = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return device.type == "cpu" and frozen and bool(computes)


def _check_launch(accelerator: Accelerator) -> None:
    """accelerate can quietly start fewer processes than the launcher was asked for."""
    found = os.environ
    promised = int(found.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != promised:
        raise OptionsError(
            f"the launcher promised {promised} processes, accelerate runs {accelerator.num_processes}: "
            "start with torchrun"
        )
    # `accelerate launch --cpu --num_processes N` says where N processes shall meet, and starts one.
    by_accelerate = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= found.keys()
    if by_accelerate and not _WORLD_SIZES & found.keys():
        raise OptionsError("accelerate launch was asked for several processes and started one: start with torchrun")


def schedule_factor(step: int, num_steps: int, warmup_share: float, final_share: float) -> float:
    """Share of the peak learning rate at `step` (0-based): linear warm-up, then a cosine down to `final_share`."""
    warmup = math.ceil(num_steps * warmup_share)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(num_steps - warmup, 1)
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def build_optimizer(network: nn.Module, options: StepOptions, head_rate: float | None = None) -> AdamW:
    """AdamW with weight decay on matrices only; new heads have a rate of their own (None: that of all)."""
    head_rate = head_rate or options.learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        is_head = name.split(".")[0] == "head" or ".score." in name or ".classifier." in name
        rate = head_rate if is_head else options.learning_rate
        decay = options.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return AdamW([{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()])


def build_schedule(optimizer: torch.optim.Optimizer, num_steps: int, options: StepOptions) -> LambdaLR:
    """`schedule_factor` as a torch scheduler."""
    return LambdaLR(
        optimizer, lambda step: schedule_factor(step, num_steps, options.warmup_share, options.final_rate_share)
    )


def accumulate(
    accelerator: Accelerator, network: Any, micro_batches: Iterable[Any], loss_of: Callable[[Any], torch.Tensor]
) -> None:
    """Backward passes over this process's micro-batches; gradients are synchronised once, in the last.

    `loss_of` gives a micro-batch's part of the global mean: divided by the global count, over all micro-batches
    and processes, so that neither ragged lengths nor the number of processes changes the result.
    """
    batches = list(micro_batches)
    for number, batch in enumerate(batches):
        is_last = number == len(batches) - 1
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(is_last)
        with nullcontext() if is_last else accelerator.no_sync(network):
            # DDP and FSDP average gradients over processes; our losses are parts of one sum.
            accelerator.backward(loss_of(batch) * accelerator.num_processes)
