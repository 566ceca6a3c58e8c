import pytest
import torch

from reward.devices import DeviceError, choose_device, choose_dtype, each_device, exact_dtype


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without accelerators, to which a test may add some."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return monkeypatch


def test_auto_prefers_cuda_then_mps_then_cpu(machine: pytest.MonkeyPatch) -> None:
    assert choose_device("auto").type == "cpu"
    machine.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "mps"
    machine.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device().type == "cuda"


@pytest.mark.parametrize(
    ("name", "problem"), [("gpu", "not a device"), ("cuda", "no 'cuda' here"), ("meta", "no 'meta'")]
)
def test_what_is_not_there_is_refused_with_what_is(machine: pytest.MonkeyPatch, name: str, problem: str) -> None:
    with pytest.raises(DeviceError, match=rf"{problem}.*auto.*cpu"):
        choose_device(name)


def test_a_cuda_device_past_the_last_is_refused(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1").index == 1
    with pytest.raises(DeviceError, match=r"2 CUDA device\(s\)"):
        choose_device("cuda:2")


def test_auto_dtype_follows_the_device(machine: pytest.MonkeyPatch) -> None:
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32
    assert choose_dtype("auto", torch.device("mps")) is torch.float16
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        machine.setattr(torch.cuda, "is_bf16_supported", lambda native=native, **_: native)
        assert choose_dtype("auto", torch.device("cuda")) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("float32", torch.float32), ("bf16", torch.bfloat16), ("torch.float16", torch.float16), ("FP32", torch.float32)],
)
def test_dtypes_have_several_spellings(name: str, expected: torch.dtype) -> None:
    assert choose_dtype(name, torch.device("cpu")) is expected


def test_an_unknown_dtype_lists_the_known_ones() -> None:
    with pytest.raises(DeviceError, match="bfloat16, float16, float32"):
        choose_dtype("int8", torch.device("cpu"))


def test_all_stands_for_every_gpu_or_else_for_the_best_there_is(machine: pytest.MonkeyPatch) -> None:
    assert each_device(["cuda:0", "cpu"]) == ["cuda:0", "cpu"]
    assert each_device(["all"]) == ["auto"]
    machine.setattr(torch.cuda, "device_count", lambda: 2)
    assert each_device(["all"]) == ["cuda:0", "cuda:1"]


def test_what_is_named_beside_all_gets_one_copy_too(machine: pytest.MonkeyPatch) -> None:
    assert each_device(["all", "cpu"]) == ["cpu"], "all is the CPU, where there is nothing else"
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "device_count", lambda: 2)
    assert each_device(["all", "cpu"]) == each_device(["cpu", "all"]) == ["cuda:0", "cuda:1", "cpu"]
    assert each_device(["all", "cuda:1"]) == ["cuda:0", "cuda:1"]
    assert each_device(["all", "cuda"]) == ["cuda:1", "cuda"]
    with pytest.raises(DeviceError, match="no 'mps' here"):
        each_device(["all", "mps"])


def test_long_sums_are_exact_where_the_device_can() -> None:
    assert exact_dtype(torch.device("cpu")) == exact_dtype(torch.device("cuda")) == torch.float64
    assert exact_dtype(torch.device("mps")) == torch.float32
