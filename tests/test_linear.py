"""Time over texts of one repeated piece grows as their length does: four times for four times."""

from __future__ import annotations

from collections.abc import Callable
from time import process_time

import pytest

import tiny_models
from growth import growth
from pcache_core import Message, Segment
from pcache_core.chat.calls import Tool
from pcache_core.chat.messages import render_chat
from pcache_core.chat.tools import FORMATS
from pcache_core.library.preamble import language_of
from pcache_core.lm.tokenizer import SegmentTokenizer
from pcache_core.picture import shown
from pcache_core.report import Report, SegmentReport
from pcache_integrations.documents import DocumentIndex

CALL = "<tool_call></tool_call>"
PIECES = [" ", "-", "\ufffd", "[", "<", "{", "\n", "(", "<eos>", "<tool_call>", CALL, "[ {", "\t-"]
LENGTH = 250_000
TEMPLATE = "{% for m in messages %}<eos>{{ m.content | trim }}{% endfor %}<eos>"


def text_of(tokenizer_template: str = TEMPLATE) -> SegmentTokenizer:
    made = tiny_models.tiny_tokenizer()
    made.chat_template = tokenizer_template
    return SegmentTokenizer(made)


TOKENS = text_of()


def chat(text: str) -> None:
    said = [Message("user", [Segment(text, "argument")])]
    render_chat(said, TOKENS.apply_chat_template, TOKENS.control_tokens)


def draw(text: str) -> None:
    report = Report((SegmentReport("document", "d", text, 9, "memory"),), 9, 9, 0, 0, "fast")
    assert str(report)
    assert report._repr_html_()


def cut(text: str) -> None:
    documents = DocumentIndex()
    documents.add(text[: len(text) // 8] + " of a document that begins as the text does")
    list(documents.split(text, "text"))


PASSES: dict[str, Callable[[str], object]] = {
    "control tokens": TOKENS.control_tokens,
    "chat markup": TOKENS.holds_chat_markup,
    "language": language_of,
    "chat": chat,
    "shown": shown,
    "picture": draw,
    "documents": cut,
    **{
        f"{form.name} calls": lambda text, form=form: form.read(text, [Tool("a")])
        for form in FORMATS
    },
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("piece", PIECES)
def test_a_text_of_four_times_the_length_takes_about_four_times_as_long(
    name: str, piece: str
) -> None:
    texts = {size: piece * (size // len(piece)) for size in (LENGTH, 4 * LENGTH)}

    started = process_time()
    PASSES[name](texts[4 * LENGTH])
    if process_time() - started < 0.02:
        return  # a pass over a megabyte that is no more than linear, whatever the clock says
    assert growth(lambda size: PASSES[name](texts[size]), LENGTH) < 10
