"""Documents are found again in any text, and no mapping ever changes the text."""

from __future__ import annotations

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus import DOCUMENTS
from pcache_core import Prompt, PromptError, Segment
from pcache_integrations.documents import ANCHOR_CHARS, DocumentIndex, WrittenIndex, settle

_letters = st.text(alphabet="ab \n", max_size=40)
_kinds = st.sampled_from(["literal", "document", "argument", "text"])
_names = st.sampled_from([None, "x", "y"])
_segments = st.lists(st.builds(Segment, _letters, _kinds, _names), min_size=1, max_size=8)


@st.composite
def _corpora(draw: st.DrawFn) -> tuple[list[str], str]:
    """Documents that share beginnings, and a text made of documents, pieces of them and noise."""
    starts = st.sampled_from(["a" * ANCHOR_CHARS, "ab" * ANCHOR_CHARS, "a b\n" * ANCHOR_CHARS, ""])
    documents = draw(st.lists(st.builds(str.__add__, starts, _letters), min_size=1, max_size=6))
    whole = st.sampled_from(documents)
    piece = st.builds(lambda text, end: text[:end], whole, st.integers(0, 60))
    return documents, "".join(draw(st.lists(st.one_of(whole, piece, _letters), max_size=6)))


def index_of(*documents: str) -> DocumentIndex:
    index = DocumentIndex()
    for number, document in enumerate(documents):
        index.add(document, f"d{number}")
    return index


def found(index: DocumentIndex, text: str) -> list[tuple[str, str | None]]:
    segments = index.split(text, "text")
    return [(segment.text, segment.name) for segment in segments if segment.kind == "document"]


class TestDocumentIndex:
    def test_documents_are_found_in_the_order_of_the_text(self) -> None:
        index = index_of(*DOCUMENTS)
        text = f"From:\n\n{DOCUMENTS[3]}\n\n{DOCUMENTS[0]}\n\nQuestion: who?"
        assert index.split(text, "argument", "context") == [
            Segment("From:\n\n", "argument", "context"),
            Segment(DOCUMENTS[3], "document", "d3"),
            Segment("\n\n", "argument", "context"),
            Segment(DOCUMENTS[0], "document", "d0"),
            Segment("\n\nQuestion: who?", "argument", "context"),
        ]

    def test_a_document_that_begins_another_is_found_when_it_stands_alone(self) -> None:
        short = "The office was quiet that day."
        index = index_of(short + " Nobody asked for a second copy.", short)
        assert found(index, f"{short}\n\nNobody knows.") == [(short, "d1")]

    def test_the_longest_of_nested_documents_is_found(self) -> None:
        short = "The office was quiet that day."
        long = short + " Nobody asked for a second copy."
        assert found(index_of(short, long), f"{long}\n") == [(long, "d1")]

    def test_a_whole_document_is_preferred_to_a_longer_one_that_is_cut_off(self) -> None:
        chunk = "The office was quiet that day."
        page = chunk + "\n\nNobody asked."
        assert found(index_of(page, chunk), f"{chunk}\n\nNobody") == [(chunk, "d1")]

    def test_a_document_between_two_others_in_sorting_order_is_found(self) -> None:
        start = "x" * ANCHOR_CHARS
        index = index_of(start + "b", start + "bca", start + "bcdz")
        assert found(index, start + "bcdy y") == [(start + "b", "d0")]

    def test_a_document_cut_off_at_the_end_of_the_text_is_found_by_its_beginning(self) -> None:
        index = index_of(DOCUMENTS[7])
        assert found(index, "See: " + DOCUMENTS[7][:60]) == [(DOCUMENTS[7][:60], "d0")]

    def test_a_document_cut_off_inside_the_text_is_found_if_half_of_it_is_there(self) -> None:
        document = DOCUMENTS[7]
        kept = document[: len(document) * 2 // 3]
        assert found(index_of(document), f"{kept}...\n\nQuestion:") == [(kept, "d0")]
        assert found(index_of(document), f"{document[:60]}...\n\nQuestion:") == []

    def test_a_text_that_only_begins_like_a_document_is_none(self) -> None:
        index = index_of("According to the register, Dodworks is run by Tobias Sadkirk.")
        assert found(index, "According to the register, Dodworks is run by Ann, not Bob.") == []

    def test_whitespace_around_a_document_is_not_part_of_it(self) -> None:
        index = index_of(f"\n  {DOCUMENTS[1]}\n")
        assert found(index, f"> {DOCUMENTS[1]}\n") == [(DOCUMENTS[1], "d0")]

    def test_a_few_words_are_no_document(self) -> None:
        index = index_of("x" * (ANCHOR_CHARS - 1))
        assert len(index) == 0
        assert found(index, "x" * 100) == []

    def test_equal_texts_are_one_document_under_the_latest_name(self) -> None:
        index = DocumentIndex()
        for name in ("old", "new", None):
            index.add(DOCUMENTS[0], name)
        assert len(index) == 1
        assert found(index, DOCUMENTS[0]) == [(DOCUMENTS[0], "new")]

    def test_the_document_unused_for_longest_is_forgotten_first(self) -> None:
        index = DocumentIndex(max_documents=2)
        index.add(DOCUMENTS[0])
        index.add(DOCUMENTS[1])
        index.split(DOCUMENTS[0], "text")
        index.add(DOCUMENTS[2])
        assert len(index) == 2
        assert found(index, "\n".join(DOCUMENTS)) == [(DOCUMENTS[0], None), (DOCUMENTS[2], None)]

    def test_a_long_prompt_is_split_fast_whatever_documents_share_their_beginning(self) -> None:
        documents = [f"According to the register, number {n} is {n * n}." for n in range(20_000)]
        index = index_of(*documents)
        text = "\n".join(documents[::100]) + "nothing known here. " * 2_000
        started = time.perf_counter()
        assert len(found(index, text)) == 200
        assert time.perf_counter() - started < 1.0  # takes about 0.05 s

    def test_threads_may_add_and_split_at_once(self) -> None:
        index = DocumentIndex(max_documents=2)
        text = "\n".join(DOCUMENTS)

        def work(number: int) -> None:
            for n in range(300):
                index.add(DOCUMENTS[(n + number) % 8])
                assert "".join(s.text for s in index.split(text, "text")) == text

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(4) as threads:
                list(threads.map(work, range(4)))
        finally:
            sys.setswitchinterval(interval)
        assert len(index) == 2

    @given(_corpora())
    def test_the_parts_join_to_the_text(self, corpus: tuple[list[str], str]) -> None:
        documents, text = corpus
        segments = index_of(*documents).split(text, "argument", "context")
        assert "".join(segment.text for segment in segments) == text
        for segment in segments:
            assert segment.text
            if segment.kind == "document":
                assert any(document.strip().startswith(segment.text) for document in documents)
            else:
                assert (segment.kind, segment.name) == ("argument", "context")

    @given(_corpora())
    def test_the_first_document_found_is_the_leftmost_and_longest(
        self, corpus: tuple[list[str], str]
    ) -> None:
        documents, text = corpus
        # Letters everywhere: then nothing counts as cut off.
        documents = [re.sub(r"\W", "c", document) for document in documents]
        text = re.sub(r"\W", "c", text) + "d"
        places = [
            (text.find(document), -len(document))
            for document in documents
            if len(document) >= ANCHOR_CHARS and document in text
        ]
        segments = index_of(*documents).split(text, "text")
        found_at = next((n for n, s in enumerate(segments) if s.kind == "document"), None)
        if found_at is None:
            assert not places
        else:
            before = sum(len(segment.text) for segment in segments[:found_at])
            assert (before, -len(segments[found_at].text)) == min(places)


class TestSettle:
    def test_spaces_before_a_boundary_go_with_the_word_behind_it(self) -> None:
        parts = [Segment("Question: ", "literal"), Segment("Where?", "argument", "question")]
        assert settle(parts, "Question: Where?").segments == (
            Segment("Question:", "literal"),
            Segment(" Where?", "argument", "question"),
        )

    def test_newlines_before_a_boundary_stay(self) -> None:
        parts = (Segment("Question:\n", "literal"), Segment("Where?", "argument"))
        assert settle(parts, "Question:\nWhere?").segments == parts

    def test_a_document_is_not_touched(self) -> None:
        parts = (
            Segment("From: ", "literal"),
            Segment(" a document ", "document"),
            Segment(" and ", "argument"),
            Segment(" a document ", "document"),
            Segment(" a document ", "document"),
        )
        assert settle(parts, "".join(part.text for part in parts)).segments == parts

    def test_spaces_alone_join_what_follows(self) -> None:
        parts = [Segment("a", "literal"), Segment("  ", "argument"), Segment("b", "literal")]
        assert settle(parts, "a  b").segments == (Segment("a  b", "literal"),)

    def test_neighbours_of_one_kind_and_name_become_one(self) -> None:
        parts = [
            Segment("a", "argument", "x"),
            Segment("", "document"),
            Segment("b", "argument", "x"),
            Segment("c", "argument", "y"),
        ]
        assert settle(parts, "abc").segments == (
            Segment("ab", "argument", "x"),
            Segment("c", "argument", "y"),
        )

    def test_a_mapping_that_does_not_fit_is_given_up(self) -> None:
        assert settle([Segment("ab", "literal")], "abc") == Prompt.from_text("abc")

    def test_an_empty_prompt_is_refused(self) -> None:
        with pytest.raises(PromptError, match="empty"):
            settle([], "")

    @given(_segments)
    def test_the_text_is_what_the_parts_join_to(self, parts: list[Segment]) -> None:
        text = "".join(part.text for part in parts)
        if not text:
            return
        prompt = settle(parts, text)
        assert prompt.text == text
        documents = [part for part in parts if part.kind == "document" and part.text]
        assert [part for part in prompt.segments if part.kind == "document"] == documents
        assert settle(prompt.segments, text) == prompt

    @given(_segments)
    def test_no_space_is_left_before_a_boundary(self, parts: list[Segment]) -> None:
        text = "".join(part.text for part in parts)
        if not text:
            return
        settled = settle(parts, text).segments
        for before, after in zip(settled, settled[1:], strict=False):
            if "document" not in (before.kind, after.kind):
                assert not before.text.endswith(" ")
                assert (before.kind, before.name) != (after.kind, after.name)


_words = st.text(alphabet="ab <|>", max_size=6)


class TestWrittenIndex:
    @given(st.lists(st.tuples(_words, _words), max_size=4), _words)
    def test_no_place_of_a_value_is_template_text_and_template_text_is_the_templates(
        self, fields: list[tuple[str, str]], end: str
    ) -> None:
        values = {f"v{number}": value for number, (_, value) in enumerate(fields)}
        sources = [*(text for text, _ in fields), end]
        text = "".join(f"{before}{value}" for before, value in fields) + end
        written = WrittenIndex()
        written.add(text, values, sources)
        parts = list(written.pieces(text, "text"))
        assert "".join(part.text for part in parts) == text
        for part in parts:
            if part.kind == "literal":
                assert any(part.text in source for source in sources)
                assert not any("<" in v and len(v) > 2 and v in part.text for v in values.values())
            elif part.kind == "argument":
                assert part.name is not None
                assert part.text == values[part.name]

    def test_a_single_word_is_not_cut_out_of_a_longer_one(self) -> None:
        written = WrittenIndex()
        written.add("Ann annotates Annals for Ann.", {"who": "Ann"}, [" annotates Annals for "])
        parts = written.pieces("Ann annotates Annals for Ann.", "text")
        assert [(part.kind, part.text) for part in parts] == [
            ("argument", "Ann"),
            ("literal", " annotates Annals for "),
            ("argument", "Ann"),
            ("text", "."),
        ]

    def test_a_text_that_no_template_wrote_is_of_the_kind_that_is_asked_for(self) -> None:
        parts = WrittenIndex().pieces("Say hello.", "argument")
        assert list(parts) == [Segment("Say hello.", "argument")]

    def test_it_is_bounded_and_keeps_what_was_written_last(self) -> None:
        written = WrittenIndex(max_texts=2)
        for text in ("one", "two", "three"):
            written.add(text, {"v": text}, [])
        kinds = [
            part.kind for text in ("one", "two", "three") for part in written.pieces(text, "text")
        ]
        assert kinds == ["text", "argument", "argument"]


def test_a_text_made_to_be_compared_in_vain_is_left_alone_in_time() -> None:
    index = DocumentIndex()
    index.add("a" * 400_000 + "b")
    text = "a" * 399_999 + "c" * 400_000
    started = time.process_time()
    assert "".join(part.text for part in index.split(text, "text")) == text
    text = "a" * 150_000 + "c" * 650_000
    assert [part.kind for part in index.split(text, "text")] == ["text"]
    assert time.process_time() - started < 5  # a minute and more if each place is compared in full
