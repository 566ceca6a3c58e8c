"""A streamed answer: nothing comes until the winner is known, then it comes at once, as the upstream's own chunks.

python examples/streamed.py "Why is the sky blue?"
"""

from __future__ import annotations

import argparse
import os

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("question", nargs="?", default="Why is the sky blue?")
parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
arguments = parser.parse_args()

with OpenAI(base_url=arguments.base_url, api_key=os.environ.get("OPENAI_API_KEY", "none")) as client:
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": arguments.question}],
        max_tokens=120,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"winnow": {"return_candidates": True}},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
            continue
        # The last chunk has no choices: usage of all candidates, and what winnow saw.
        winnow = chunk.model_dump()["winnow"]
        print(f"\n\ncandidate {winnow['winner']} of {len(winnow['candidates'])}", end="")
        print(f", {chunk.usage.total_tokens} tokens in all" if chunk.usage else "")
