"""What commands say, as it arrives where it is no terminal."""

from __future__ import annotations

import pytest

from winnow.commands.ask import show
from winnow.console import CommandError, say


def test_a_line_stays_in_one_piece(capsys: pytest.CaptureFixture[str]) -> None:
    line = "policy in " + "/a/folder [of mine]" * 20
    say(line)
    assert capsys.readouterr().err == f"{line}\n"


def test_an_answer_is_printed_as_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    text = "one line of an answer " * 40
    with pytest.raises(CommandError, match="is this base URL a winnow proxy"):
        show({"choices": [{"message": {"content": text}}]})
    assert capsys.readouterr().out == f"{text}\n"
