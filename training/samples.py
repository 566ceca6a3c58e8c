"""Answers of a policy under training, to look at: greedy, so that they change only as the policy does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from feedback.records import Messages
from reward.rendering import content_text
from training.conversations import encode_prompt
from training.distributed import Placement
from training.policies import Policy
from training.runlog import Sample


@torch.no_grad()
def greedy_samples(
    policy: Policy, placement: Placement, prompts: Sequence[Messages], max_new_tokens: int
) -> list[Sample]:
    """One answer to each prompt; in the main process only where the others are not needed for it."""
    if not prompts or not (placement.is_sharded or placement.accelerator.is_main_process):
        return []
    from transformers import GenerationConfig

    rows = [encode_prompt(policy, prompt)[-policy.max_length :] for prompt in prompts]
    width = max(map(len, rows))
    device = placement.accelerator.device
    ids = torch.tensor([[policy.pad_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        # What a checkpoint's own defaults might change.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted(policy.stop_ids),
        pad_token_id=policy.pad_id,
        use_cache=True,
    )
    policy.model.eval()
    found = placement.plain.generate(
        input_ids=ids, attention_mask=mask, generation_config=settings, synced_gpus=placement.is_sharded
    )
    texts = policy.tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
    return [Sample(content_text(prompt[-1]), text.strip()) for prompt, text in zip(prompts, texts, strict=True)]
