"""Streamed text: whole characters, no part of a stop string, the same as decoding at once."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pcache_core.generate import AnswerText, TokenScorer


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


class Counted:
    """Decodes as a byte-level tokenizer would, without zeros, which are its special tokens."""

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, token_ids: Sequence[int]) -> str:
        self.tokens += len(token_ids)
        return decode([token_id for token_id in token_ids if token_id])


def fall_back(token_ids: Sequence[int]) -> str:
    """Decode as tokenizers with byte fallback do: one wrong byte spoils all those beside it."""
    try:
        return bytes(token_ids).decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(token_ids)


broken = st.lists(
    st.sampled_from([b"\xff", b"\xff" * 9, b"\xe4", b"\xe4\xb8", "中".encode(), b"a", "�".encode(),
                     "😀".encode(), b"\xf0\x9f\x98", b"\0" * 12, b"END", b"EN"]),
    max_size=14,
).map(b"".join)  # fmt: skip


@given(broken)
def test_broken_bytes_come_out_as_they_decode_and_wait_for_a_few_tokens_at_most(
    text: bytes,
) -> None:
    counted = Counted()
    answer = AnswerText(counted, ())
    shown = ""
    for count, byte in enumerate(text, 1):
        shown += answer.add(byte)
        # A fourth byte of the last eight and one may be the first of the three that can still wait.
        assert len(decode(text[:count].replace(b"\0", b""))) - len(shown) <= 9
    assert shown + answer.finish() == decode(text.replace(b"\0", b""))
    assert counted.tokens <= 150 * (len(text) + 1)


@given(broken)
def test_a_stop_string_after_broken_bytes_stops(text: bytes) -> None:
    expected = decode(text.replace(b"\0", b"")).partition("END")[0]
    answer = AnswerText(Counted(), ["END"])
    shown = ""
    for byte in text:
        shown += answer.add(byte)
        if answer.stopped:
            break
    assert shown + ("" if answer.stopped else answer.finish()) == expected
    assert answer.stopped == (b"END" in text)


@given(broken)
def test_the_texts_of_the_tokens_are_those_of_the_answer(text: bytes) -> None:
    answer, scorer = AnswerText(decode, ()), TokenScorer(decode, 0)
    for byte in text:
        assert scorer.record(byte, 0.0, ()).token == answer.add(byte)


def test_a_run_of_broken_bytes_is_shown_while_it_goes_on() -> None:
    for one in (decode, fall_back):
        answer = AnswerText(one, ())
        shown = "".join(answer.add(byte) for byte in b"\xff" * 1000)
        assert 990 <= len(shown) <= 1000
        assert shown + answer.finish() == "\ufffd" * 1000


def test_a_wrong_byte_after_a_character_of_byte_tokens_is_one() -> None:
    answer = AnswerText(fall_back, ())
    shown = "".join(answer.add(byte) for byte in "中".encode() + b"\xff")
    assert shown + answer.finish() == "中\ufffd"


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
