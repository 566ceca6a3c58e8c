"""What the trainers save is served as it is: whole folders and adapters, with their chat template and last tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import orjson
import pytest
import torch

from feedback.records import Message
from proxy.upstreams.base import UpstreamCall
from proxy.upstreams.local import LocalUpstream
from proxy.upstreams.local_prompts import PromptEncoder
from proxy.upstreams.local_requests import parse_chat
from proxy.upstreams.local_text import Vocabulary
from reward.errors import ModelLoadError
from tests.fakes.models import build_tiny_causal_lm
from training.conversations import encode_prompt
from training.policies import Policy, load_policy, save_policy

HELLO = [{"role": "user", "content": "hello you"}]
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_causal_lm(tmp_path_factory.mktemp("base"), seed=3)


def trained(base: Path, tuning: Literal["full", "lora"], target: Path, seed: int = 1) -> Policy:
    """A policy with other weights than its base, saved to `target`."""
    policy = load_policy(str(base), tuning=tuning)
    rng = torch.Generator().manual_seed(seed)
    state = policy.trainable_state()
    policy.load_trainable_state(
        {name: value + 0.2 * torch.randn(value.shape, generator=rng) for name, value in state.items()}
    )
    save_policy(policy, target)
    return policy


@torch.no_grad()
def greedy_ids(policy: Policy) -> list[int]:
    """As many tokens as asked for, or up to one that ends an answer, by the plainest loop there is."""
    policy.model.eval()
    ids = encode_prompt(policy, HELLO)
    length = len(ids)
    while len(ids) < length + MAX_TOKENS:
        token = int(policy.model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in policy.stop_ids:
            break
        ids.append(token)
    return ids[length:]


def greedy(policy: Policy) -> str:
    return str(policy.tokenizer.decode(greedy_ids(policy), skip_special_tokens=True))


async def served(model: Path, **members: Any) -> dict[str, Any]:
    upstream = LocalUpstream(str(model), device="cpu")
    await upstream.open()
    try:
        asked = {"messages": HELLO, "temperature": 0, "max_tokens": MAX_TOKENS} | members
        response = await upstream.send(UpstreamCall("POST", "/chat/completions", orjson.dumps(asked)))
        body: dict[str, Any] = orjson.loads(await response.read())
        assert response.status == 200, body
        return body
    finally:
        await upstream.aclose()


def said(body: dict[str, Any]) -> str:
    return str(body["choices"][0]["message"]["content"])


@pytest.mark.parametrize("tuning", ["full", "lora"])
async def test_a_trained_policy_says_what_it_learnt(
    tuning: Literal["full", "lora"], base: Path, tmp_path: Path
) -> None:
    policy = trained(base, tuning, tmp_path / "policy")
    assert (tmp_path / "policy" / "adapter_config.json").is_file() == (tuning == "lora")
    body = await served(tmp_path / "policy")
    assert said(body) == greedy(policy)
    assert body["model"] == "policy"
    assert said(body) != said(await served(base))


async def test_an_answer_ends_where_training_ended_it(base: Path, tmp_path: Path) -> None:
    """The policy's own generation settings say what ends an answer, also where the base's do not."""
    policy = trained(base, "lora", tmp_path / "policy")
    (whole,) = (await served(tmp_path / "policy"))["choices"]
    assert whole["finish_reason"] == "length"
    settings = tmp_path / "policy" / "generation_config.json"
    record = json.loads(settings.read_text(encoding="utf-8"))
    ids = greedy_ids(policy)
    settings.write_text(json.dumps(record | {"eos_token_id": ids[-1]}), encoding="utf-8")
    (cut,) = (await served(tmp_path / "policy"))["choices"]
    assert cut["finish_reason"] == "stop"
    assert cut["message"]["content"] == policy.tokenizer.decode(ids[: ids.index(ids[-1])], skip_special_tokens=True)


async def test_checkpoints_of_one_shape_have_fingerprints_of_their_own(base: Path, tmp_path: Path) -> None:
    trained(base, "lora", tmp_path / "one", seed=1)
    trained(base, "lora", tmp_path / "two", seed=2)
    bodies = [await served(tmp_path / name) for name in ("one", "two", "one")]
    one, two, again = (body["system_fingerprint"] for body in bodies)
    assert one == again != two


async def test_an_adapter_without_a_tokenizer_takes_its_bases(base: Path, tmp_path: Path) -> None:
    policy = trained(base, "lora", tmp_path / "policy")
    for path in (tmp_path / "policy").iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    assert said(await served(tmp_path / "policy")) == greedy(policy)


async def test_what_is_incomplete_is_refused(base: Path, tmp_path: Path) -> None:
    trained(base, "lora", tmp_path / "policy")
    settings = tmp_path / "policy" / "adapter_config.json"
    record = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps(record | {"base_model_name_or_path": None}), encoding="utf-8")
    with pytest.raises(ModelLoadError, match="does not say what it adapts"):
        await served(tmp_path / "policy")
    settings.write_text(json.dumps(record | {"base_model_name_or_path": "package:no-such-package"}), encoding="utf-8")
    with pytest.raises(ModelLoadError, match="no-such-package"):
        await served(tmp_path / "policy")
    settings.write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "policy" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"adapter_model\.safetensors is missing"):
        await served(tmp_path / "policy")
    settings.write_text("{", encoding="utf-8")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        await served(tmp_path / "policy")


async def test_a_template_that_training_gave_goes_along(tmp_path: Path) -> None:
    base = build_tiny_causal_lm(tmp_path / "base", chat_template=False)
    policy = trained(base, "full", tmp_path / "policy")
    shutil.rmtree(base)
    assert said(await served(tmp_path / "policy")) == greedy(policy)


def test_serving_reads_a_prompt_as_training_did(base: Path) -> None:
    policy = load_policy(str(base), tuning="frozen")
    encoder = PromptEncoder(
        policy.tokenizer,
        Vocabulary(policy.tokenizer),
        vocab_size=len(policy.tokenizer),
        max_positions=512,
        max_new_tokens=8,
    )
    conversations: list[list[Message]] = [
        [{"role": "user", "content": "hello you"}],
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": " Three. "},
            {"role": "user", "content": "four\n"},
        ],
    ]
    for messages in conversations:
        (served_prompt,) = encoder.encode(parse_chat(orjson.dumps({"messages": messages})))
        assert list(served_prompt.token_ids) == encode_prompt(policy, messages)
