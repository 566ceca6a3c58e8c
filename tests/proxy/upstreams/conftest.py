from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from proxy.upstreams.local_decoding import LanguageModel, load
from tests.fakes.models import build_tiny_causal_lm


@pytest.fixture(scope="session")
def tiny_lm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 512 positions, on disk."""
    return build_tiny_causal_lm(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_lm(tiny_lm_path: Path) -> LanguageModel:
    return load(str(tiny_lm_path), device="cpu", dtype="auto", trust_remote_code=False)


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny models are slower on more: threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
