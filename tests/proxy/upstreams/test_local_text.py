import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstreams.local_text import CompletionText, TokenLogprob, Vocabulary
from tests.fakes.models import build_tokenizer

TOKENIZER = build_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def grow(ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], CompletionText]:
    """What is released after each token, and at the end."""
    text = CompletionText(VOCABULARY.decode, stops)
    pieces = []
    for token_id in ids:
        stopped = text.append(token_id)
        pieces.append(text.release()[0])
        if stopped:
            break
    text.finish()
    pieces.append(text.release(final=True)[0])
    return pieces, text


@given(st.text(max_size=40))
def test_any_text_comes_out_whole_and_in_whole_code_points(expected: str) -> None:
    pieces, _ = grow(ids_of(expected))
    assert "".join(pieces) == expected


def test_a_code_point_of_several_tokens_is_released_at_once() -> None:
    ids = ids_of("🦊")
    assert len(ids) == 4
    pieces, _ = grow(ids)
    assert pieces == ["", "", "", "🦊", ""]


def test_half_a_code_point_at_the_end_reads_as_a_replacement_character() -> None:
    pieces, _ = grow(ids_of("a🦊")[:-1])
    assert "".join(pieces) == "a\ufffd"


@given(
    st.text(alphabet="abc ", max_size=30),
    st.lists(st.text(alphabet="abc ", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_text_ends_before_the_stop_that_is_complete_first(full: str, stops: list[str]) -> None:
    # One token a character, so that the first complete stop is the same whoever looks.
    ids = [TOKENIZER.convert_tokens_to_ids("Ġ" if character == " " else character) for character in full]
    ends = [at + len(stop) for stop in stops if (at := full.find(stop)) >= 0]
    expected = full
    if ends:
        seen = full[: min(ends)]
        expected = seen[: min(seen.find(stop) for stop in stops if stop in seen)]
    pieces, text = grow(ids, tuple(stops))
    assert "".join(pieces) == text.text == expected
    assert text.stopped is bool(ends)


def test_a_stop_across_tokens_is_held_back_and_never_released() -> None:
    ids = ids_of("France") + ids_of(" is")
    pieces, text = grow(ids, ("ce i",))
    assert "".join(pieces) == "Fran"
    assert text.stopped


def test_held_text_is_released_when_it_turns_out_harmless() -> None:
    pieces, text = grow([TOKENIZER.convert_tokens_to_ids(c) for c in "xyz"], ("xyw",))
    assert pieces == ["", "", "xyz", ""]
    assert not text.stopped


def test_a_stop_completed_by_the_last_half_code_point_counts() -> None:
    text = CompletionText(VOCABULARY.decode, ("\ufffd",))
    text.append(ids_of("🦊")[0])
    assert text.finish()
    assert text.text == ""


def test_logprobs_come_with_their_text_and_not_past_a_stop() -> None:
    text = CompletionText(VOCABULARY.decode, ("cd",))
    released: list[TokenLogprob] = []
    for token in (TOKENIZER.convert_tokens_to_ids(c) for c in "abcd"):
        text.append(token, TokenLogprob(token, -1.0))
        new_text, tokens = text.release()
        assert len(new_text) == len(tokens)
        released += tokens
    released += text.release(final=True)[1]
    assert [VOCABULARY.text(token.token_id) for token in released] == ["a", "b"]
    assert [token.offset for token in released] == [0, 1]


@pytest.mark.parametrize("text", ["plain words", "naïve 🦊", "tab\tnew\nline", "日本"])
def test_token_bytes_join_to_the_text(text: str) -> None:
    assert b"".join(VOCABULARY.token_bytes(token) for token in ids_of(text)).decode() == text


def test_part_of_a_code_point_is_spelled_out() -> None:
    assert VOCABULARY.text(ids_of("🦊")[0]) == "\\xf0"


def test_special_tokens_have_a_name_and_no_place_in_texts() -> None:
    end = TOKENIZER.eos_token_id
    assert VOCABULARY.text(end) == "<|im_end|>"
    assert VOCABULARY.decode([end, *ids_of("a"), end]) == "a"
