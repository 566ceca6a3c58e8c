"""The `openai` client as it is, pointed at winnow: all candidates of one question with their rewards, best first.

python examples/drop_in.py --best-of 4 "Why is the sky blue?"
"""

from __future__ import annotations

import argparse
import os

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("question", nargs="?", default="Why is the sky blue?")
parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
parser.add_argument("--best-of", type=int, default=4)
arguments = parser.parse_args()

# The key goes to the upstream; the embedded model needs none, but the client insists on some text.
with OpenAI(base_url=arguments.base_url, api_key=os.environ.get("OPENAI_API_KEY", "none")) as client:
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": arguments.question}],
        max_tokens=120,
        # Everything winnow adds is optional: without this line, an ordinary answer comes back, and it is the best.
        extra_body={"winnow": {"best_of": arguments.best_of, "return_candidates": True}},
    )

print(answer.choices[0].message.content)
winnow = answer.model_dump()["winnow"]
print(f"\nchosen from {len(winnow['candidates'])} by {winnow['reward_model']}:")
for candidate in sorted(winnow["candidates"], key=lambda one: (not one["valid"], -(one["reward"] or 0.0))):
    scored = "unscored" if candidate["reward"] is None else f"{candidate['reward']:+.2f}"
    verdict = scored if candidate["valid"] else candidate["reason"]
    print(f"{verdict:>8}  {(candidate['content'] or '')[:80]!r}")
