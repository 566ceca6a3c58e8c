from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

from proxy.upstreams import local_decoding
from proxy.upstreams.local_decoding import DecodeBatch, LanguageModel, load, prefill
from reward.errors import ModelLoadError
from tests.fakes.models import Family, build_tiny_causal_lm, build_tiny_reward_model, build_tokenizer

FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "gpt2")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    path = build_tiny_causal_lm(tmp_path_factory.mktemp("models") / request.param, family=request.param)
    return load(str(path), device="cpu", dtype="auto", trust_remote_code=False)


def begun(model: LanguageModel, prompt: list[int], num_rows: int = 1) -> DecodeBatch:
    cache = DynamicCache()
    for _ in prefill(model, prompt, cache):
        pass
    return DecodeBatch.of_prompt(model, cache, len(prompt), num_rows)


def full_logits(model: LanguageModel, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.model(input_ids=torch.tensor([token_ids])).logits[0]
    return logits


def test_rows_that_join_and_leave_compute_as_if_alone(model: LanguageModel) -> None:
    texts = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30, 31, 32, 33]]
    batch = begun(model, texts[0])
    for row, prompt in enumerate(texts[1:], start=1):
        batch.merge(begun(model, prompt))
        tokens = [40 + row + i for i in range(len(batch))]
        logits = batch.step(tokens)
        for i, token in enumerate(tokens):
            texts[i] = [*texts[i], token]
            assert torch.allclose(logits[i], full_logits(model, texts[i])[-1], atol=1e-5)
    # The longest leaves: the padding it caused goes with it.
    batch.keep([1, 2])
    logits = batch.step([50, 51])
    for i, (text, token) in enumerate(zip(texts[1:], (50, 51), strict=True)):
        assert torch.allclose(logits[i], full_logits(model, [*text, token])[-1], atol=1e-5)
    batch.keep([])
    assert len(batch) == 0
    batch.merge(begun(model, [3, 4]))
    assert torch.allclose(batch.step([5])[0], full_logits(model, [3, 4, 5])[-1], atol=1e-5)


def test_rows_that_share_a_prompt_compute_as_if_each_had_its_own(model: LanguageModel) -> None:
    logits = begun(model, [5, 6, 7], num_rows=3).step([10, 11, 12])
    for i, token in enumerate((10, 11, 12)):
        assert torch.allclose(logits[i], full_logits(model, [5, 6, 7, token])[-1], atol=1e-5)


def test_a_prompt_in_chunks_gives_the_logits_of_one_forward(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_decoding, "PREFILL_CHUNK", 4)
    prompt = list(range(10, 21))
    parts = list(prefill(model, prompt, DynamicCache(), all_logits=True))
    assert [(part.start, part.end) for part in parts] == [(0, 4), (4, 8), (8, 11)]
    assert torch.allclose(torch.cat([part.logits[0] for part in parts]), full_logits(model, prompt), atol=1e-5)


def test_a_folder_without_a_model_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="safetensors"):
        load(str(tmp_path), device="cpu", dtype="auto", trust_remote_code=False)


def test_the_fingerprint_tells_dtypes_apart(tiny_lm_path: Path, tiny_lm: LanguageModel) -> None:
    narrow = load(str(tiny_lm_path), device="cpu", dtype="bfloat16", trust_remote_code=False)
    again = load(str(tiny_lm_path), device="cpu", dtype="float32", trust_remote_code=False)
    assert narrow.fingerprint != tiny_lm.fingerprint == again.fingerprint


def test_a_checkpoint_without_its_output_layer_is_refused(tmp_path: Path) -> None:
    """transformers would fill it with random numbers."""
    path = build_tiny_reward_model(tmp_path)
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight"):
        load(str(path), device="cpu", dtype="auto", trust_remote_code=False)


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    path = build_tiny_causal_lm(tmp_path)
    (path / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ModelLoadError, match="cannot load"):
        load(str(path), device="cpu", dtype="auto", trust_remote_code=False)


def test_a_recurrent_model_is_refused_with_a_way_out(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    MambaForCausalLM(
        MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError):
        load(str(tmp_path), device="cpu", dtype="auto", trust_remote_code=False)
