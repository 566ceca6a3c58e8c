"""What other engines send to have text scored, and what they expect back. Pure: JSON values in, JSON values out.

A trainer or gateway that already speaks to one of these can be pointed at our scoring service as it is:

| path             | shape of                            | rewards in the reply                                       |
| ---------------- | ----------------------------------- | ---------------------------------------------------------- |
| `/get_reward`    | OpenRLHF `serve_rm`                 | normalised; raw ones beside them in `extra_logs`           |
| `/classify`      | vLLM, for models of one label       | raw; through a sigmoid unless `activation` is false        |
| `/pooling`       | vLLM                                | raw                                                        |
| `/v1/embeddings` | SGLang's way to serve reward models | raw                                                        |
| `/predict`       | text-embeddings-inference           | raw with `raw_scores`, else through a sigmoid              |
| `/rerank`        | text-embeddings-inference           | the same, best first                                       |

Raw where the original is raw: whoever compares the two must see the same numbers.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from feedback.records import Message, Messages, RecordError, parse_messages
from reward.errors import InputError
from reward.scorer import Score, TemplatedText


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt and one completion of it, as messages: rendered by the reward model's own template."""

    prompt: Messages
    completion: Messages


Item = Conversation | TemplatedText


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, understood: what to score, and how to say it."""

    items: Sequence[Item]
    reply: Callable[[Sequence[Score], str], Any]
    """From scores, one an item, and the reward model's name to the JSON value of the answer."""


def read_openrlhf(body: Mapping[str, Any]) -> Asked:
    """`{"query": [text], "prompts"?: [text], "labels"?}`. Raises `InputError`, as do the other readers.

    Empty lists are answered with empty lists: with several addresses OpenRLHF sends them to all but the first.
    """
    queries = _texts(body, "query")
    prompts: Sequence[str | None] = [None] * len(queries)
    if body.get("prompts") is not None:
        prompts = _texts(body, "prompts")
    if len(prompts) != len(queries):
        raise InputError(f"prompts: {len(prompts)} of them for {len(queries)} texts in query")

    def reply(scores: Sequence[Score], name: str) -> Any:
        return {
            "rewards": [score.reward for score in scores],
            # Between 0 and 1, for its filter of prompts that are too easy or too hard.
            "scores": [_share(score) for score in scores],
            "extra_logs": _logs(scores),
        }

    return Asked([TemplatedText(text, prompt) for text, prompt in zip(queries, prompts, strict=True)], reply)


def read_vllm_classify(body: Mapping[str, Any]) -> Asked:
    """`{"input": text | [text]}` or `{"messages"}`, `activation` (before: `use_activation`) true unless given."""
    activation = body.get("activation", body.get("use_activation"))
    shown = _raw if activation is False else _sigmoid

    def reply(scores: Sequence[Score], name: str) -> Any:
        data = [
            {"index": index, "label": "LABEL_0", "probs": [shown(score.raw_reward)], "num_classes": 1}
            for index, score in enumerate(scores)
        ]
        return _vllm_list("classify", name, data, scores)

    return Asked(_inputs(body), reply)


def read_vllm_pooling(body: Mapping[str, Any]) -> Asked:
    """`{"input": text | [text]}` or `{"messages"}`."""

    def reply(scores: Sequence[Score], name: str) -> Any:
        data = [{"index": index, "object": "pooling", "data": [score.raw_reward]} for index, score in enumerate(scores)]
        return _vllm_list("pool", name, data, scores)

    return Asked(_inputs(body), reply)


def read_sglang_embeddings(body: Mapping[str, Any]) -> Asked:
    """`{"input": text | [text]}`: the reward is the only number of each "embedding"."""

    def reply(scores: Sequence[Score], name: str) -> Any:
        data = [
            {"object": "embedding", "index": index, "embedding": [score.raw_reward]}
            for index, score in enumerate(scores)
        ]
        return {"object": "list", "model": name, "data": data, "usage": _usage(scores)}

    return Asked(_inputs(body), reply)


def read_tei_predict(body: Mapping[str, Any]) -> Asked:
    """`{"inputs": text | [prompt, completion] | [[…], …]}`, `raw_scores` false unless given."""
    inputs, shown = body.get("inputs"), _tei_scale(body)
    batched = isinstance(inputs, list) and bool(inputs) and all(isinstance(one, list) for one in inputs)
    items = [_tei_item(one) for one in inputs] if isinstance(inputs, list) and batched else [_tei_item(inputs)]

    def reply(scores: Sequence[Score], name: str) -> Any:
        predictions = [[{"score": shown(score.raw_reward), "label": "LABEL_0"}] for score in scores]
        return predictions if batched else predictions[0]

    return Asked(items, reply)


def read_tei_rerank(body: Mapping[str, Any]) -> Asked:
    """`{"query": prompt, "texts": [completion]}`, `raw_scores` and `return_text` false unless given."""
    query, texts, shown = body.get("query"), _texts(body, "texts"), _tei_scale(body)
    if not isinstance(query, str):
        raise InputError("query: must be text")

    def reply(scores: Sequence[Score], name: str) -> Any:
        order = sorted(range(len(scores)), key=lambda index: -scores[index].raw_reward)
        with_text = body.get("return_text") is True
        return [
            {"index": index, "score": shown(scores[index].raw_reward)} | ({"text": texts[index]} if with_text else {})
            for index in order
        ]

    return Asked([_pair(query, text) for text in texts], reply)


READERS: Mapping[str, Callable[[Mapping[str, Any]], Asked]] = {
    "/get_reward": read_openrlhf,
    "/classify": read_vllm_classify,
    "/pooling": read_vllm_pooling,
    "/v1/embeddings": read_sglang_embeddings,
    "/predict": read_tei_predict,
    "/rerank": read_tei_rerank,
}
"""By path."""


def _inputs(body: Mapping[str, Any]) -> list[Item]:
    if body.get("messages") is not None:
        return [_conversation(body["messages"])]
    return [TemplatedText(text) for text in _texts(body, "input")]


def _conversation(messages: object) -> Conversation:
    try:
        parsed: Sequence[Message] = parse_messages(messages, "messages", "user")
    except RecordError as error:
        raise InputError(str(error)) from error
    if len(parsed) < 2 or parsed[-1]["role"] != "assistant":
        raise InputError("messages: must end with the assistant's answer that is to be scored, after a prompt")
    return Conversation(parsed[:-1], parsed[-1:])


def _tei_item(value: object) -> Item:
    if isinstance(value, str):
        return TemplatedText(value)
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        if len(value) == 2:
            return _pair(*value)
        if len(value) == 1:
            return TemplatedText(value[0])
    raise InputError("inputs: must be text, a pair [prompt, completion], or a list of [text] and pairs")


def _pair(prompt: str, completion: str) -> Conversation:
    return Conversation([{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}])


def _texts(body: Mapping[str, Any], field: str) -> list[str]:
    value = body.get(field)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{field}: must be text or a list of texts")
    return texts


def _tei_scale(body: Mapping[str, Any]) -> Callable[[float], float]:
    return _raw if body.get("raw_scores") is True else _sigmoid


def _raw(reward: float) -> float:
    return reward


def _sigmoid(reward: float) -> float:
    # Two forms, so that neither end overflows.
    return 1 / (1 + math.exp(-reward)) if reward >= 0 else math.exp(reward) / (1 + math.exp(reward))


def _share(score: Score) -> float:
    return score.percentile / 100 if score.percentile is not None else _sigmoid(score.reward)


def _logs(scores: Sequence[Score]) -> dict[str, list[float]]:
    """What OpenRLHF logs beside the rewards: a list for each name."""
    logs: dict[str, list[float]] = {"raw_reward": [score.raw_reward for score in scores]} if scores else {}
    if scores and all(score.std is not None for score in scores):
        logs["std"] = [score.std for score in scores if score.std is not None]
    for name in (scores[0].objectives or {}) if scores else {}:
        logs[f"objective_{name}"] = [(score.objectives or {})[name] for score in scores]
    return logs


def _usage(scores: Sequence[Score]) -> dict[str, Any]:
    total = sum(score.prompt_tokens + score.completion_tokens for score in scores)
    return {"prompt_tokens": total, "total_tokens": total, "completion_tokens": 0, "prompt_tokens_details": None}


def _vllm_list(prefix: str, name: str, data: list[dict[str, Any]], scores: Sequence[Score]) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": name,
        "data": data,
        "usage": _usage(scores),
    }
