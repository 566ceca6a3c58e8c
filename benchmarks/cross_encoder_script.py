"""Runs in the environment of sentence-transformers: CrossEncoder.predict as it is by default, without its sigmoid.

Questions and answers are lines of JSON: `{"source"}` loads, `{"requests": [[[prompt, completion], …], …]}` scores
each request as it comes, or all in one list with `"joined": true`, and answers with rewards and CPU seconds.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from sentence_transformers import CrossEncoder

_answers, sys.stdout = sys.stdout, sys.stderr
torch.set_num_threads(1)


def main() -> None:
    model = CrossEncoder(json.loads(sys.stdin.readline())["source"], device="cpu")
    print("{}", file=_answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        requests = question["requests"]
        started = time.process_time()
        if question["joined"]:
            rewards = _rewards(model, [pair for request in requests for pair in request])
        else:
            rewards = [reward for request in requests for reward in _rewards(model, request)]
        print(json.dumps({"rewards": rewards, "cpu_s": time.process_time() - started}), file=_answers, flush=True)


def _rewards(model: CrossEncoder, pairs: list[list[str]]) -> list[float]:
    rewards: list[float] = model.predict(
        [tuple(pair) for pair in pairs], activation_fn=torch.nn.Identity(), show_progress_bar=False
    ).tolist()
    return rewards


main()
