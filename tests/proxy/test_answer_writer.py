from __future__ import annotations

import asyncio
from typing import cast

from proxy.answer_writer import AnswerWriter


class Sent(asyncio.Transport):
    """What each call to the transport was given."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[bytes] = []
        self.closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.pieces.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closing


def writer(sent: Sent | None = None) -> tuple[AnswerWriter, list[bytes]]:
    sent = sent or Sent()
    return AnswerWriter(cast(asyncio.Transport, sent), asyncio.get_running_loop(), close=lambda: None), sent.pieces


async def test_a_head_goes_out_with_what_follows_at_once() -> None:
    answers, sent = writer()
    for _ in range(2):
        answers.begin()
        for piece in (b"head", b"body", b"more"):
            answers.write(piece)
    await asyncio.sleep(0)
    assert sent == [b"headbody", b"more"] * 2


async def test_a_head_that_nothing_follows_does_not_wait() -> None:
    answers, sent = writer()
    answers.begin()
    answers.write(b"head")
    await asyncio.sleep(0)
    assert sent == [b"head"]
    answers.write(b"body")
    assert sent == [b"head", b"body"]


async def test_a_head_is_dropped_where_the_client_has_hung_up() -> None:
    transport = Sent()
    answers, sent = writer(transport)
    answers.begin()
    answers.write(b"head")
    transport.closing = True
    await asyncio.sleep(0)
    assert sent == []


async def test_a_head_goes_before_what_is_written_beside_it() -> None:
    answers, sent = writer()
    answers.begin()
    answers.write(b"head")
    answers.flush()
    assert sent == [b"head"]


async def test_what_asks_a_client_to_go_on_is_not_kept_for_the_answer() -> None:
    answers, sent = writer()
    answers.begin()
    answers.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert sent == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    answers.write(b"HTTP/1.1 200 OK\r\n\r\n")
    answers.write(b"body")
    assert sent[1:] == [b"HTTP/1.1 200 OK\r\n\r\nbody"]


async def test_an_answer_is_never_reordered_by_the_next_requests_arrival() -> None:
    answers, sent = writer()
    answers.begin()
    answers.write(b"head")
    answers.begin()  # The next request of a pipeline.
    for piece in (b"body", b"more", b"end"):
        answers.write(piece)
    await asyncio.sleep(0)
    assert b"".join(sent) == b"headbodymoreend"
