"""Rewards for answers that you already have: reads JSON lines, writes them back with `rewards`.

Each line has `prompt` and `completions`. With the proxy running:

python examples/score_records.py records.jsonl > scored.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("file", type=Path)
parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
arguments = parser.parse_args()

with OpenAI(base_url=arguments.base_url, api_key=os.environ.get("OPENAI_API_KEY", "none")) as client:
    for line in arguments.file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        asked = {"prompt": record["prompt"], "completions": record["completions"]}
        scored: dict[str, Any] = client.post("/score", body=asked, cast_to=dict[str, Any])
        rewards = [score["reward"] for score in scored["scores"]]
        print(json.dumps(record | {"rewards": rewards, "reward_model": scored["reward_model"]}))
