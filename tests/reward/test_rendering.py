from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from feedback.records import Message
from reward.errors import InputError
from reward.rendering import Renderer, Template, content_text
from tests.fakes.models import BEGIN, CHAT_TEMPLATE, END, build_tokenizer

TOKENIZER = build_tokenizer()
TEMPLATES: tuple[Template, ...] = ("chat", "plain")

# Ends turns without a newline, opens every answer with an empty thought, and forgets thoughts of earlier turns.
THINKING_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]"
    "{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)
TOOL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}("
    "{% for name, value in call.function.arguments.items() %}{{ name }}={{ value }};{% endfor %}){% endfor %}"
    "{% if message['role'] == 'tool' %}#{{ message.tool_call_id }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT_TEMPLATE = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"

contents = st.text(max_size=40).filter(lambda text: "<|" not in text)
turns = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "system"]), contents),
    min_size=1,
    max_size=4,
)
answers = st.lists(st.builds(lambda content: {"role": "assistant", "content": content}, contents), min_size=1)


def tokenizer(template: str | None = CHAT_TEMPLATE, **options: bool) -> Any:
    built = build_tokenizer(**options)
    built.chat_template = template
    return built


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}  # type: ignore[typeddict-item]  # tests say odd things too


def call(name: str, arguments: Any) -> Message:
    return assistant(
        None, tool_calls=[{"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}]
    )


def completion_text(renderer: Renderer, prompt: list[Message], completion: list[Message], **keys: Any) -> str:
    rendered = renderer.render(prompt, completion)
    return str(TOKENIZER.decode(rendered.ids[rendered.completion_start :], **keys))


CONVERSATIONS = [
    ([user("Why is the sky blue?")], [assistant("Because of scattering.")]),
    ([user("Héllo 🌍\n"), assistant("Hm?"), user("第二")], [assistant("多字节 🌍🌍")]),
    ([{"role": "developer", "content": "Be short."}, user("Why?")], [assistant("Because."), user("?"), assistant("!")]),
    ([user("Why?")], [assistant("")]),
    ([user("")], [assistant("\n\n  starts with space")]),
]


@pytest.mark.parametrize(("prompt", "completion"), CONVERSATIONS)
def test_chat_ids_are_those_of_the_template_itself(prompt: list[Any], completion: list[Any]) -> None:
    rendered = Renderer(TOKENIZER, "chat", 512).render(prompt, completion)
    roles = {"developer": "system"}
    whole = [{**message, "role": roles.get(message["role"], message["role"])} for message in [*prompt, *completion]]
    expected = TOKENIZER.apply_chat_template(whole, tokenize=True, return_dict=False)
    assert rendered.ids == expected
    assert rendered.ids.count(TOKENIZER.bos_token_id) == 1
    assert not rendered.truncated
    assert rendered.prompt_tokens == rendered.completion_start
    assert rendered.prompt_tokens + rendered.completion_tokens == len(rendered) == len(rendered.ids)


def test_the_completion_starts_exactly_after_the_generation_prompt() -> None:
    chat = Renderer(TOKENIZER, "chat", 512)
    assert completion_text(chat, [user("Why?")], [assistant("Because.")]) == "Because.<|im_end|>\n"
    plain = Renderer(TOKENIZER, "plain", 512)
    assert completion_text(plain, [user("Why?")], [assistant("Because.")]) == " Because.<|im_end|>"
    rendered = plain.render([user("Why?")], [assistant("Because.")])
    assert TOKENIZER.decode(rendered.ids) == "<|begin|>User: Why?\n\nAssistant: Because.<|im_end|>"


def test_a_completion_of_several_messages_starts_at_its_first() -> None:
    completion: list[Message] = [call("f", "{}"), {"role": "tool", "content": "42"}, assistant("So 42.")]
    text = completion_text(Renderer(TOKENIZER, "chat", 512), [user("f?")], completion)
    assert text.endswith("<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\nSo 42.<|im_end|>\n")
    assert text.startswith("{")
    plain = completion_text(Renderer(TOKENIZER, "plain", 512), [user("f?")], completion)
    assert plain.endswith("\n\nTool: 42\n\nAssistant: So 42.<|im_end|>")


def test_templates_that_change_earlier_turns_still_show_where_the_completion_starts() -> None:
    renderer = Renderer(tokenizer(THINKING_TEMPLATE), "chat", 512)
    assert completion_text(renderer, [user("Why?")], [assistant("Because.")]) == "</think>Because."
    several = [assistant("One."), user("And?"), assistant("Two.")]
    assert completion_text(renderer, [user("Why?")], several) == "One.[user]And?[assistant]<think></think>Two."


@pytest.mark.parametrize("template", TEMPLATES)
@given(prompt=turns, completion=answers)
def test_the_last_words_of_a_completion_are_always_in_it(template: Template, prompt: Any, completion: Any) -> None:
    rendered = Renderer(TOKENIZER, template, 4096).render(prompt, completion)
    assert 0 < rendered.completion_start < len(rendered)
    decoded = TOKENIZER.decode(rendered.ids[rendered.completion_start :])
    assert completion[-1]["content"] in decoded
    before = TOKENIZER.decode(rendered.ids[: rendered.completion_start])
    assert prompt[-1]["content"] in before


@pytest.mark.parametrize("template", ["chat", "plain", "pair"])
@given(prompt=turns, completion=answers, max_length=st.integers(8, 60))
def test_nothing_is_longer_than_the_model_allows(
    template: Template, prompt: Any, completion: Any, max_length: int
) -> None:
    whole = Renderer(TOKENIZER, template, 100_000).render(prompt, completion)
    cut = Renderer(TOKENIZER, template, max_length).render(prompt, completion)
    assert len(cut) == min(len(whole), max_length)
    assert cut.truncated == (len(whole) > max_length)
    assert (cut.prompt_tokens, cut.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert 0 <= cut.completion_start < len(cut)
    if not cut.truncated:
        assert cut == whole


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_long_prompt_loses_its_beginning_and_keeps_bos_and_completion(template: Template) -> None:
    prompt, completion = [user("start " + "word " * 100 + "finish")], [assistant("the whole answer")]
    whole = Renderer(TOKENIZER, template, 4096).render(prompt, completion)
    cut = Renderer(TOKENIZER, template, 60).render(prompt, completion)
    assert cut.truncated
    assert len(cut) == 60
    assert cut.ids[0] == TOKENIZER.bos_token_id
    assert cut.ids[1:] == whole.ids[-59:]
    assert cut.ids[cut.completion_start :] == whole.ids[whole.completion_start :]
    assert "finish" in TOKENIZER.decode(cut.ids)


def test_without_a_bos_the_whole_room_goes_to_the_prompt() -> None:
    renderer = Renderer(tokenizer(CHAT_TEMPLATE.replace("{{ bos_token }}", "")), "chat", 30)
    cut = renderer.render([user("word " * 100)], [assistant("answer")])
    assert len(cut) == 30
    assert TOKENIZER.bos_token_id not in cut.ids


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_completion_that_is_too_long_alone_loses_its_middle(template: Template) -> None:
    prompt, completion = [user("Why?")], [assistant("first " + "middle " * 200 + "last")]
    whole = Renderer(TOKENIZER, template, 4096).render(prompt, completion)
    cut = Renderer(TOKENIZER, template, 41).render(prompt, completion)
    kept = whole.ids[whole.completion_start :]
    assert cut.truncated
    assert cut.completion_start == 0
    assert cut.ids == kept[:21] + kept[-20:]


class TestPair:
    """Encoders trained on sentence pairs."""

    def renderer(self, max_length: int = 512) -> Renderer:
        built = build_tokenizer(chat_template=False)
        built.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        return Renderer(built, "pair", max_length)

    def test_ids_and_segments_are_those_of_the_tokenizer(self) -> None:
        rendered = self.renderer().render([user("Why?")], [assistant("Because.")])
        expected = TOKENIZER("Why?", "Because.", return_token_type_ids=True)
        assert rendered.ids == expected["input_ids"]
        assert rendered.token_type_ids == expected["token_type_ids"]
        assert TOKENIZER.decode(rendered.ids[rendered.completion_start :]) == "Because."
        assert rendered.prompt_tokens == len(TOKENIZER("Why?", add_special_tokens=False)["input_ids"])

    def test_several_messages_say_who_speaks(self) -> None:
        rendered = self.renderer().render([user("Why?"), assistant("Hm?"), user("Well?")], [assistant("So.")])
        assert TOKENIZER.decode(rendered.ids) == ("<|begin|>User: Why?\n\nAssistant: Hm?\n\nUser: Well?<|im_end|>So.")

    def test_a_long_prompt_loses_its_beginning_between_intact_separators(self) -> None:
        rendered = self.renderer(20).render([user("word " * 50 + "finish")], [assistant("the answer")])
        assert rendered.truncated
        assert len(rendered) == 20
        text = TOKENIZER.decode(rendered.ids)
        assert text.startswith(BEGIN)
        assert text.endswith("finish<|im_end|>the answer")
        assert rendered.token_type_ids is not None
        assert rendered.token_type_ids == [0] * rendered.completion_start + [1] * (20 - rendered.completion_start)

    def test_a_long_completion_loses_its_middle(self) -> None:
        rendered = self.renderer(20).render([user("Why?")], [assistant("first " + "middle " * 50 + "last")])
        text = TOKENIZER.decode(rendered.ids)
        assert text.startswith("<|begin|><|im_end|>first")
        assert text.endswith("last")
        assert len(rendered) == 20

    def test_an_empty_completion_still_has_a_token(self) -> None:
        rendered = self.renderer().render([user("Why?")], [assistant("")])
        assert rendered.completion_tokens == 0
        assert rendered.completion_start == len(rendered) - 1


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat_template", [CHAT_TEMPLATE, TOOL_TEMPLATE], ids=["without tools", "with tools"])
def test_different_tool_calls_are_different_completions(template: Template, chat_template: str) -> None:
    renderer = Renderer(tokenizer(chat_template), template, 512)
    calls = [call("f", '{"a": 1}'), call("f", '{"a": 2}'), call("g", '{"a": 1}')]
    rendered = [renderer.render([user("f?")], [one]).ids for one in calls]
    assert len(set(map(tuple, rendered))) == 3


def test_a_template_with_tools_gets_arguments_as_an_object_and_ids_of_results() -> None:
    renderer = Renderer(tokenizer(TOOL_TEMPLATE), "chat", 512)
    expected = "f(a=1;b=x;)<|im_end|>\n"
    assert completion_text(renderer, [user("f?")], [call("f", '{"a": 1, "b": "x"}')]) == expected
    assert completion_text(renderer, [user("f?")], [call("f", {"a": 1, "b": "x"})]) == expected
    result: Message = {"role": "tool", "content": "42", "tool_call_id": "c9"}
    assert "42#c9" in TOKENIZER.decode(renderer.render([user("f?"), call("f", "{}"), result], [assistant("x")]).ids)


def test_arguments_that_are_no_json_are_refused_by_a_template_that_needs_them() -> None:
    renderer = Renderer(tokenizer(TOOL_TEMPLATE), "chat", 512)
    with pytest.raises(InputError, match="refuses these messages"):
        renderer.render([user("f?")], [call("f", "{broken")])


@pytest.mark.parametrize("template", ["chat", "plain", "pair"])
def test_the_same_words_in_another_form_are_the_same_sequence(template: Template) -> None:
    renderer = Renderer(TOKENIZER, template, 512)
    parts = [
        {"type": "text", "text": "one"},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "text", "text": "two"},
    ]
    same = [{"role": "user", "content": parts}], [assistant(None, refusal="I cannot.", tool_calls=None)]
    assert renderer.render(*same) == renderer.render([user("one\ntwo")], [assistant("I cannot.")])  # type: ignore[arg-type]


def test_null_content_is_no_words() -> None:
    assert content_text(assistant(None)) == ""
    assert content_text({"role": "user"}) == ""
    assert content_text(assistant(None, refusal="No.")) == "No."


def test_a_message_with_members_of_the_wire_renders_as_its_words() -> None:
    """Answers as servers send them, with nulls and empty lists, score like the same answers in training data."""
    wire = assistant("Yes.", refusal=None, tool_calls=[], function_call=None, annotations=[])
    for chat_template in (CHAT_TEMPLATE, TOOL_TEMPLATE):
        renderer = Renderer(tokenizer(chat_template), "chat", 512)
        assert renderer.render([user("?")], [wire]) == renderer.render([user("?")], [assistant("Yes.")])


def test_the_same_ids_whatever_thread_asks() -> None:
    renderer = Renderer(TOKENIZER, "chat", 64)
    items = [([user(f"question {i} " * (i % 9))], [assistant(f"answer {i}")]) for i in range(100)]
    alone = [renderer.render(*item) for item in items]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda item: renderer.render(*item), items)) == alone


@pytest.mark.parametrize("template", ["chat", "plain", "pair"])
def test_limits_stored_with_a_tokenizer_are_lifted_before_threads_share_it(template: Template) -> None:
    built = tokenizer()
    built.backend_tokenizer.enable_truncation(4)
    built.backend_tokenizer.enable_padding(length=64)
    renderer = Renderer(built, template, 512)
    assert built.backend_tokenizer.truncation is None
    assert built.backend_tokenizer.padding is None
    item = [user("Why is the sky blue?")], [assistant("Because of scattering.")]
    assert renderer.render(*item) == Renderer(TOKENIZER, template, 512).render(*item)


def test_a_plain_text_ends_with_one_end_token() -> None:
    for built in (build_tokenizer(), build_tokenizer(adds_begin=False)):
        rendered = Renderer(built, "plain", 512).render([user("?")], [assistant("!")])
        assert rendered.ids[-1] == built.eos_token_id
        assert rendered.ids.count(built.eos_token_id) == 1
    built.eos_token = None
    bare = Renderer(built, "plain", 512).render([user("?")], [assistant("!")])
    assert built.decode(bare.ids) == "User: ?\n\nAssistant: !"


def test_an_end_token_that_the_tokenizer_adds_is_the_completions() -> None:
    built = build_tokenizer()
    ends = [(token, built.convert_tokens_to_ids(token)) for token in (BEGIN, END)]
    adds_both = processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=ends)
    built.backend_tokenizer.post_processor = adds_both
    for words in range(1, 12):
        prompt, completion = [user("word " * words)], [assistant("Because. " * (12 - words))]
        assert Renderer(built, "plain", 512).render(prompt, completion) == Renderer(TOKENIZER, "plain", 512).render(
            prompt, completion
        )


def test_what_a_template_refuses_is_the_callers_error() -> None:
    renderer = Renderer(tokenizer(STRICT_TEMPLATE), "chat", 512)
    with pytest.raises(InputError, match="no system role"):
        renderer.render([{"role": "developer", "content": "x"}], [assistant("y")])


@pytest.mark.parametrize("template", ["chat", "plain", "pair"])
def test_half_a_surrogate_pair_is_the_callers_error(template: Template) -> None:
    with pytest.raises(InputError, match="surrogate"):
        Renderer(TOKENIZER, template, 512).render([user("\ud83c")], [assistant("y")])


def test_a_renderer_needs_a_template_and_offsets() -> None:
    with pytest.raises(InputError, match="no chat template"):
        Renderer(tokenizer(None), "chat", 512)

    class Slow:
        chat_template = None
        is_fast = False

    with pytest.raises(InputError, match="Slow has no fast"):
        Renderer(Slow(), "plain", 512)


SPECIALS = [BEGIN, END, "<|im_start|>"]
hostile = st.lists(st.sampled_from([*SPECIALS, "<|im_", "end|>", "<|", "<", " ", "\n", "user", "x"]), max_size=8).map(
    "".join
)


@pytest.mark.parametrize("template", ["chat", "plain", "pair"])
@given(asked=hostile, answered=hostile, role=hostile)
def test_special_tokens_in_messages_stay_text(template: Template, asked: str, answered: str, role: str) -> None:
    renderer = Renderer(TOKENIZER, template, 4096)

    def specials(prompt: list[Any], completion: list[Any]) -> list[int]:
        ids = renderer.render(prompt, completion).ids
        return [token for token in ids if token in TOKENIZER.all_special_ids]

    written = specials([user(asked), {"role": role, "content": asked}], [assistant(f"x{answered}")])
    assert written == specials([user("x"), user("x")], [assistant("x")])


def test_special_tokens_in_tool_calls_stay_text() -> None:
    renderer = Renderer(tokenizer(TOOL_TEMPLATE), "chat", 512)
    rendered = renderer.render([user("f?")], [call(f"f{END}", {f"a{END}": [END, 1]})])
    assert TOKENIZER.decode(rendered.ids).count(END) == 2, "the template's own"


def test_texts_without_special_tokens_are_left_alone() -> None:
    texts = ["<|im_end |>", "< |im_end|>", "a <b> c", "[SEP]", "</s>"]
    renderer = Renderer(TOKENIZER, "chat", 512)
    for text in texts:
        assert text in TOKENIZER.decode(renderer.render([user(text)], [assistant("y")]).ids)


@given(turns, contents.filter(str.strip))
def test_text_templated_elsewhere_is_the_same_sequence(prompt: list[Message], answer: str) -> None:
    renderer = Renderer(TOKENIZER, "chat", 4096)
    expected = renderer.render(prompt, [assistant(answer)])
    asked: Any = TOKENIZER.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole: Any = TOKENIZER.apply_chat_template([*prompt, assistant(answer)], tokenize=False)
    assert renderer.render_text(whole, asked) == expected
    # Without its prompt, by the heading of the last assistant's turn.
    assert renderer.render_text(whole) == expected
    # Whoever writes a turn stops at its mark, before the line's end that the template puts behind it.
    assert whole.endswith("<|im_end|>\n")
    assert renderer.render_text(whole[:-1], asked) == expected


def test_text_whose_turn_has_not_ended_is_scored_as_it_stands() -> None:
    renderer = Renderer(TOKENIZER, "chat", 64)
    asked: Any = TOKENIZER.apply_chat_template([user("Why?")], tokenize=False, add_generation_prompt=True)
    cut_off = renderer.render_text(asked + "Because", asked)
    assert TOKENIZER.decode(cut_off.ids) == asked + "Because"


def test_where_the_completion_begins_must_be_told_or_seen() -> None:
    renderer = Renderer(TOKENIZER, "chat", 64)
    for text, prompt in (("hello there", None), ("hello there", "goodbye"), ("", None), ("", "")):
        with pytest.raises(InputError):
            renderer.render_text(text, prompt)
    with pytest.raises(InputError, match="send the prompt"):
        Renderer(tokenizer(None), "plain", 64).render_text("User: x\n\nAssistant: y")
    told = Renderer(tokenizer(None), "plain", 64).render_text("hello there", "hello ")
    assert 0 < told.completion_start < len(told)
