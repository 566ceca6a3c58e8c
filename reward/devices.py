"""Which device and number format a model runs in, from what the user wrote (`auto` by default).

Shared by generating and scoring, so that both make the same choice on the same machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

AUTO: Final = "auto"
ALL: Final = "all"
_DTYPES: Final = {
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}


class DeviceError(ValueError):
    """The device or dtype does not exist, here or at all. The message lists what does."""


def choose_device(name: str = AUTO) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU; anything else is torch's own spelling (`cuda:1`).

    Raises `DeviceError`.
    """
    import torch

    if name == AUTO:
        return torch.device(_available()[0])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"{name!r} is not a device; {_choices()}") from error
    if device.type == "cuda" and torch.cuda.is_available() and device.index is not None:
        num_devices = torch.cuda.device_count()
        if device.index >= num_devices:
            raise DeviceError(f"{name!r} does not exist: this machine has {num_devices} CUDA device(s), from cuda:0")
    if device.type not in _available():
        raise DeviceError(f"no {name!r} here; {_choices()}")
    return device


def each_device(names: Sequence[str]) -> list[str]:
    """The devices that copies of a model go to; `all` stands for every GPU that this process sees, or `auto`.

    What is named beside `all` gets a copy too, and not two for being among them. Raises `DeviceError`.
    """
    if ALL not in names:
        return list(names)
    import torch

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or [AUTO]
    named = [name for name in names if name != ALL]
    known = {_numbered(name) for name in named}
    return [name for name in gpus if not known or _numbered(name) not in known] + named


def _numbered(name: str) -> str:
    """One spelling a device: `cuda` and `cuda:0` are the same one."""
    device = choose_device(name)
    return f"{device.type}:{device.index or 0}"


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU's on a device; to a GPU from pinned memory, so that nobody waits for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def threads_must_take_turns(name: str = AUTO) -> bool:
    """Whether models of several threads may not compute at once there: Metal's command queues do not bear it."""
    return choose_device(name).type == "mps"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` takes bfloat16 where the GPU computes in it, else float16 on a GPU and float32 on the CPU.

    A CPU without bf16 units is several times slower in bfloat16 than in float32, so it must be asked for by name.
    Raises `DeviceError`.
    """
    import torch

    if name == AUTO:
        match device.type:
            case "cuda":
                return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
            case "mps":
                return torch.float16
            case _:
                return torch.float32
    spelled = _DTYPES.get(name.lower().removeprefix("torch."))
    if spelled is None:
        raise DeviceError(f"{name!r} is not a dtype; choose auto, {', '.join(sorted(set(_DTYPES.values())))}")
    dtype = getattr(torch, spelled)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _available() -> list[str]:
    """Device types of this machine, fastest first."""
    import torch

    available = []
    if torch.cuda.is_available():
        available.append("cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    return [*available, "cpu"]


def _choices() -> str:
    return f"choose {AUTO} or one of: {', '.join(_available())}"


def exact_dtype(device: torch.device) -> torch.dtype:
    """What sums over many tokens are kept in: fp64, where the device has it. Apple's GPUs do not."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64
