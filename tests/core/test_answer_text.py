"""Streamed text: whole characters, no part of a stop string, the same as decoding at once."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pcache_core.generate import AnswerText


def decode(token_ids: Sequence[int]) -> str:
    """One token a byte, as a byte-level tokenizer would decode."""
    return bytes(token_ids).decode("utf-8", errors="replace")


def stream(text: str, stop: Sequence[str]) -> tuple[list[str], bool]:
    """Pieces as they come, and whether a stop string ended them."""
    answer = AnswerText(decode, stop)
    pieces = []
    for byte in text.encode():
        pieces.append(answer.add(byte))
        if answer.stopped:
            return pieces, True
    pieces.append(answer.finish())
    return pieces, answer.stopped


words = st.text(alphabet="ab é€😀", max_size=30)
stops = st.lists(st.text(alphabet="ab€", min_size=1, max_size=4), max_size=3)


@given(words, stops)
def test_the_pieces_are_the_text_before_the_first_stop(text: str, stop: list[str]) -> None:
    pieces, stopped = stream(text, stop)
    ends = [text.find(s) + len(s) for s in stop if s in text]
    # The first stop to be complete wins; of those that end together, the one that starts first.
    first_end = min(ends, default=None)
    if first_end is None:
        assert not stopped
        assert "".join(pieces) == text
    else:
        starts = [text.find(s) for s in stop if text[:first_end].find(s) >= 0]
        assert stopped
        assert "".join(pieces) == text[: min(starts)]


@given(words, stops)
def test_no_piece_breaks_a_character_or_leaks_a_part_of_a_stop(text: str, stop: list[str]) -> None:
    pieces, _ = stream(text, stop)
    shown = ""
    for piece in pieces:
        assert "\ufffd" not in piece
        shown += piece
        assert not any(s in shown for s in stop)


def test_an_unfinished_character_at_the_end_is_shown_as_a_replacement() -> None:
    answer = AnswerText(decode, ())
    assert answer.add("é".encode()[0]) == ""
    assert answer.finish() == "\ufffd"


def test_a_waiting_part_of_a_stop_comes_out_when_nothing_follows() -> None:
    answer = AnswerText(decode, ["END"])
    assert [answer.add(byte) for byte in b"xEN"] == ["x", "", ""]
    assert answer.finish() == "EN"
    assert not answer.stopped


@given(st.lists(st.one_of(st.binary(min_size=1, max_size=12), words.map(str.encode)), max_size=6))
def test_broken_bytes_cost_no_character_around_them(parts: list[bytes]) -> None:
    content = b"".join(parts)
    answer = AnswerText(decode, ())
    pieces = [answer.add(byte) for byte in content] + [answer.finish()]
    assert "".join(pieces) == decode(content)


def test_broken_bytes_come_out_while_they_come_and_a_stop_after_them_ends() -> None:
    answer = AnswerText(decode, ["stop"])
    assert any(answer.add(0xFF) for _ in range(20))
    said = [answer.add(byte) for byte in b"\xff\xffstop"]
    assert answer.stopped
    assert "s" not in "".join(said)


def test_a_run_of_broken_bytes_is_decoded_a_few_tokens_at_a_time() -> None:
    longest = 0

    def counting(token_ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decode(token_ids)

    answer = AnswerText(counting, ())
    for _ in range(3000):
        answer.add(0xFF)
    assert longest < 40
