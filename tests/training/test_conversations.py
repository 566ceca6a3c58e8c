"""Which tokens a policy learns to write: S1, S2 and S4 of the checklist, for several tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from feedback.records import Message
from reward.errors import InputError
from tests.fakes.models import END, build_tiny_causal_lm
from training.conversations import Conversation, encode_conversation, encode_prompt, fitted
from training.policies import Policy, load_policy

ASKED: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]
ANSWERED: list[Message] = [{"role": "assistant", "content": "Paris is the capital."}]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(str(build_tiny_causal_lm(tmp_path_factory.mktemp("base"))), tuning="frozen")


def text_that_counts(policy: Policy, conversation: Conversation) -> str:
    counted = [i for i, kept in zip(conversation.ids, conversation.completion_mask, strict=True) if kept]
    decoded: str = policy.tokenizer.decode(counted)
    return decoded


def test_s1_loss_only_on_reply_tokens_and_their_end(policy: Policy) -> None:
    found = encode_conversation(policy, ASKED, ANSWERED)
    assert text_that_counts(policy, found) == f"Paris is the capital.{END}"
    assert found.ids[-1] == policy.tokenizer.eos_token_id and found.completion_mask[-1]
    assert found.ids[: found.prompt_length] == encode_prompt(policy, ASKED)


def test_s1_every_turn_of_a_conversation_counts_by_itself(policy: Policy) -> None:
    prompt: list[Message] = [
        {"role": "system", "content": "Please answer the question."},
        *ASKED,
        {"role": "assistant", "content": "one two"},
        {"role": "user", "content": "three four"},
    ]
    every = encode_conversation(policy, prompt, ANSWERED, every_turn=True)
    assert text_that_counts(policy, every) == f"one two{END}Paris is the capital.{END}"
    last = encode_conversation(policy, prompt, ANSWERED)
    assert last.ids == every.ids
    assert text_that_counts(policy, last) == f"Paris is the capital.{END}"


def test_a_completion_of_several_messages_counts_where_the_assistant_speaks(policy: Policy) -> None:
    completion: list[Message] = [
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "three"},
    ]
    found = encode_conversation(policy, ASKED, completion)
    assert text_that_counts(policy, found) == f"one{END}three{END}"


@pytest.mark.parametrize("template", [True, False], ids=["chat template", "none of its own"])
def test_s2_the_end_is_learnt_also_where_padding_is_the_same_token(template: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = build_tiny_causal_lm(tmp_path, chat_template=template)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(base)
    found = load_policy(str(base), tuning="frozen")
    assert found.pad_id == found.tokenizer.eos_token_id
    conversation = encode_conversation(found, ASKED, ANSWERED)
    assert conversation.ids[-1] == found.pad_id and conversation.completion_mask[-1]
    assert text_that_counts(found, conversation) == f"Paris is the capital.{END}"


def test_the_end_is_added_where_the_template_has_none(policy: Policy, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = build_tiny_causal_lm(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(base)
    found = load_policy(str(base), tuning="frozen")
    conversation = encode_conversation(found, ASKED, ANSWERED)
    assert text_that_counts(found, conversation).endswith(END)


def test_a_turn_may_end_with_a_token_that_is_not_the_tokenizers_eos(tmp_path: Path) -> None:
    """As in base models with a chat template: what ends the turn must be learnt, and must end answers when serving."""
    import json

    from transformers import AutoTokenizer

    base = build_tiny_causal_lm(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    end = tokenizer.convert_tokens_to_ids(END)
    tokenizer.eos_token = "<|begin|>"
    tokenizer.save_pretrained(base)
    for name in ("config.json", "generation_config.json"):
        record = json.loads((base / name).read_text(encoding="utf-8"))
        (base / name).write_text(json.dumps({**record, "eos_token_id": tokenizer.eos_token_id}), encoding="utf-8")
    found = load_policy(str(base), tuning="frozen")
    assert end in found.stop_ids
    assert text_that_counts(found, encode_conversation(found, ASKED, ANSWERED)).endswith(f"capital.{END}")


def test_s4_the_template_is_applied_once(policy: Policy) -> None:
    found = encode_conversation(policy, ASKED, ANSWERED)
    direct: Any = policy.tokenizer.apply_chat_template([*ASKED, *ANSWERED], tokenize=True, return_dict=True)
    # What the template puts behind the end of the last turn (a line break) teaches nothing.
    assert found.ids == direct["input_ids"][: len(found.ids)]
    assert found.ids.count(policy.tokenizer.bos_token_id) == 1
    asked: Any = policy.tokenizer.apply_chat_template(
        ASKED, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert encode_prompt(policy, ASKED) == asked["input_ids"]


def test_a_special_token_in_a_text_stays_text(policy: Policy) -> None:
    sly: list[Message] = [{"role": "assistant", "content": f"one{END} two"}]
    found = encode_conversation(policy, ASKED, sly)
    assert found.ids.count(policy.tokenizer.eos_token_id) == 2, "the prompt's end, and the answer's"
    assert text_that_counts(policy, found).count("two") == 1


@pytest.mark.parametrize("max_length", [8, 12, 20, 30, 60])
def test_s4_cutting_never_leaves_a_row_without_tokens_that_count(policy: Policy, max_length: int) -> None:
    short = encode_conversation(policy, ASKED, ANSWERED)
    long = encode_conversation(policy, ASKED, [{"role": "assistant", "content": "one two three four " * 8}])
    cut_short, cut_long = fitted(policy, [short, long], max_length)
    for whole, cut in ((short, cut_short), (long, cut_long)):
        assert 1 < len(cut) <= max_length
        assert cut.num_completion_tokens > 0
        assert not cut.completion_mask[0]
        assert cut.truncated == (cut.ids != whole.ids)
    assert cut_short.ids[: cut_short.prompt_length] == cut_long.ids[: cut_long.prompt_length], "one prompt for both"


def test_what_fits_is_not_cut_and_the_completion_is_kept_before_the_prompt(policy: Policy) -> None:
    whole = encode_conversation(policy, ASKED, ANSWERED)
    assert fitted(policy, [whole], len(whole)) == [whole]
    (cut,) = fitted(policy, [whole], len(whole) - 3)
    begin = policy.tokenizer.bos_token_id
    assert whole.ids[0] == begin
    assert cut.ids == [begin, *whole.ids[4:]] and cut.prompt_length == whole.prompt_length - 3
    assert cut.num_completion_tokens == whole.num_completion_tokens


def test_what_the_assistant_did_not_say_cannot_be_learnt(policy: Policy) -> None:
    with pytest.raises(InputError, match="no message of the assistant"):
        encode_conversation(policy, ASKED, ASKED)
    with pytest.raises(InputError, match="surrogate"):
        encode_conversation(policy, ASKED, [{"role": "assistant", "content": "\ud800"}])
