"""What OpenRLHF and verl send, replayed: they get the rewards that `winnow score` gives the same messages."""

from __future__ import annotations

import asyncio
import json
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from prometheus_client import CollectorRegistry
from transformers import AutoTokenizer

from proxy.app import Parts, create_app
from proxy.config_loading import load_settings
from proxy.upstreams.absent import AbsentUpstream
from reward.local import LocalScorer
from reward.manifest import Head, Manifest
from reward.normalisation import Normalisation
from tests.fakes.models import build_tiny_reward_model
from tests.fakes.serving import serving
from winnow.__main__ import run

TOLERANCE = 1e-4
VERL = Path(__file__).parents[2] / "examples" / "verl_reward.py"
SAMPLES = [
    ("What is the capital of France?", "Paris."),
    ("What is the capital of France?", "I do not know, my friend. " * 4),
    ("Count to three.", "one two three"),
    ("Count to three.", "1"),
    ("Say it with a dash – and accents: é", "ça va – très bien"),
    ("A long one. " * 12, "short"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with a scale of its own: a normalised reward is none of the raw ones."""
    torch.set_num_threads(1)
    stock = build_tiny_reward_model(tmp_path_factory.mktemp("contracts") / "stock")
    folder = Path(shutil.copytree(stock, stock.with_name("model")))
    scale = Normalisation(0.5, 0.25, tuple(q / 10 - 5 for q in range(101)))
    Manifest("tiny", "none", Head(), "chat", 256, normalisation=scale).save(folder)
    return folder


@pytest.fixture(scope="module")
def service(model: Path) -> Iterator[str]:
    settings = load_settings(flags={})
    parts = Parts({settings.default_upstream: AbsentUpstream("local")}, {"default": LocalScorer(str(model))})
    app = create_app(settings, parts, CollectorRegistry(), scores_only=True)
    with serving(app.asgi) as url:
        yield url


@pytest.fixture(scope="module")
def by_command(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Of each sample, `reward` and `raw_reward` by `winnow score`."""
    home = tmp_path_factory.mktemp("scored")
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in SAMPLES]
    (home / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(SystemExit) as exited:
        arguments = ["--reward-model", str(model), str(home / "in.jsonl"), "-o", str(home / "out.jsonl")]
        run(["score", "--device", "cpu", *arguments])
    assert exited.value.code == 0
    scored = [json.loads(line) for line in (home / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{"reward": one["rewards"][0], "raw_reward": one["raw_rewards"][0]} for one in scored]


async def posted(url: str, bodies: list[dict[str, Any]]) -> list[Any]:
    """The answers to requests that are all under way at once."""
    async with httpx2.AsyncClient(timeout=60) as client:
        answers = await asyncio.gather(*(client.post(url, json=body) for body in bodies))
    assert [answer.status_code for answer in answers] == [200] * len(bodies)
    return [answer.json() for answer in answers]


async def test_openrlhf_gets_the_rewards_of_winnow_score(
    model: Path, service: str, by_command: list[dict[str, float]]
) -> None:
    """One request a finished sample, all at once; `query` is decoded from the ids that the policy was given and wrote,
    special tokens included: it ends with the end of turn."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    bodies = []
    for prompt, completion in SAMPLES:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        written = tokenizer(asked + completion + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        bodies.append({"query": [tokenizer.decode(written)], "prompts": [asked], "labels": [""]})
    answers = await posted(f"{service}/get_reward", bodies)
    assert [answer["rewards"] for answer in answers] == [
        [pytest.approx(one["reward"], abs=TOLERANCE)] for one in by_command
    ]
    assert [answer["extra_logs"]["raw_reward"] for answer in answers] == [
        [pytest.approx(one["raw_reward"], abs=TOLERANCE)] for one in by_command
    ]
    assert all(0 <= answer["scores"][0] <= 1 for answer in answers)


async def test_verls_function_gets_the_rewards_of_winnow_score(
    service: str, by_command: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WINNOW_SCORE_URL", f"{service}/v1")
    compute_score = runpy.run_path(str(VERL))["compute_score"]
    scored = await asyncio.gather(
        *(
            compute_score(data_source="any", solution_str=completion, ground_truth=None, extra_info={"prompt": prompt})
            for prompt, completion in SAMPLES
        )
    )
    for found, expected in zip(scored, by_command, strict=True):
        assert found["score"] == pytest.approx(expected["reward"], abs=TOLERANCE)
        assert found["raw_reward"] == pytest.approx(expected["raw_reward"], abs=TOLERANCE)


async def test_verls_own_reward_models_requests_get_the_raw_rewards_of_winnow_score(
    model: Path, service: str, by_command: list[dict[str, float]]
) -> None:
    """It templates the conversation with the reward model's tokenizer, and reads the last number of the last entry."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}], tokenize=False
        )
        for prompt, completion in SAMPLES
    ]
    expected = [pytest.approx(one["raw_reward"], abs=TOLERANCE) for one in by_command]
    classified = await posted(
        f"{service}/classify", [{"model": "any", "input": text, "activation": False} for text in inputs]
    )
    assert [answer["data"][-1]["probs"][-1] for answer in classified] == expected
    embedded = await posted(f"{service}/v1/embeddings", [{"model": "any", "input": text} for text in inputs])
    assert [answer["data"][-1]["embedding"][-1] for answer in embedded] == expected
