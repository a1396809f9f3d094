"""Text and known documents → segments, shared by the integrations.

A framework hands over a flat string. Which parts of it are documents, and which are values that
were filled into a template, is found by content alone, so it does not matter how they travelled to
the model.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING

from pcache_core.prompt import Prompt, Segment, SegmentKind

if TYPE_CHECKING:
    from pcache_core.lm.tokenizer import SegmentTokenizer

# A document is recognised by its first characters. Shorter ones would be found by accident, and
# have fewer tokens than a module needs anyway.
ANCHOR_CHARS = 24
# A value of one or two characters occurs in any text by accident, and spells no special token.
_MIN_VALUE_CHARS = 3

# How often in vain a text's characters may be compared with documents, so that a search takes time
# in proportion to the text, whatever it and the documents are.
_PATIENCE = 16

# Where a stretch of text ends; whether it is template text; else the variable it is a value of.
_Span = tuple[int, bool, str | None]


class DocumentIndex:
    """Documents' texts, found again in any prompt.

    Thread-safe. Content addressed: equal texts are one document. Holds at most `max_documents`;
    the one that was added or found longest ago goes first.
    """

    def __init__(self, max_documents: int = 100_000) -> None:
        self._max_documents = max_documents
        self._names: OrderedDict[str, str | None] = OrderedDict()
        # Documents by their first characters; each bucket is sorted, so the one that agrees
        # longest with a text is found by bisection however many share an opening.
        self._buckets: dict[str, list[str]] = {}
        self._longest = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._names)

    def add(self, text: str, name: str | None = None) -> None:
        """Remember a document. Surrounding whitespace is not part of it; a few words are none."""
        document = text.strip()
        if len(document) < ANCHOR_CHARS:
            return
        with self._lock:
            if document not in self._names:
                insort(self._buckets.setdefault(document[:ANCHOR_CHARS], []), document)
            self._longest = max(self._longest, len(document))
            self._names[document] = name if name is not None else self._names.get(document)
            self._names.move_to_end(document)
            while len(self._names) > self._max_documents:
                self._forget(self._names.popitem(last=False)[0])

    def remove(self, text: str) -> None:
        """Forget a document if it is known."""
        document = text.strip()
        with self._lock:
            if document in self._names:
                del self._names[document]
                self._forget(document)

    def split(self, text: str, kind: SegmentKind, name: str | None = None) -> list[Segment]:
        """Cut `text` into the documents it holds and, between them, segments of `kind`.

        Leftmost first, then longest. A document cut off at the end is found too: by its beginning,
        if that ends `text`, or is at least half of the document and does not end inside a word.

        Returns: segments whose texts join to `text`; none when it is empty.
        """
        segments: list[Segment] = []
        start = position = 0
        end = len(text) - ANCHOR_CHARS + 1
        patience = _PATIENCE * len(text)
        with self._lock:
            known = self._buckets
            while patience > 0:
                anchors = (p for p in range(position, end) if text[p : p + ANCHOR_CHARS] in known)
                position = next(anchors, end)
                if position >= end:
                    break
                # One character more than any document has: where it doesn't end, it goes on.
                rest = text[position : position + self._longest + 1]
                document, agreed = _find(known[rest[:ANCHOR_CHARS]], rest)
                if not document:
                    position += 1
                    patience -= agreed
                    continue
                if position > start:
                    segments.append(Segment(text[start:position], kind, name))
                segments.append(Segment(rest[:agreed], "document", self._names[document]))
                self._names.move_to_end(document)
                start = position = position + agreed
        if start < len(text):
            segments.append(Segment(text[start:], kind, name))
        return segments

    def cut(self, pieces: Sequence[Segment]) -> list[Segment]:
        """Cut the documents out of a text whose pieces are known.

        First out of the whole text, as a template may write a document line by line, and a value
        may be a part of one. Then out of each piece, as a document that was cut off ends where its
        variable does.

        Returns: segments whose texts join to the pieces' text.
        """
        found = self.split("".join(piece.text for piece in pieces), "text")
        stretches = in_stretches(pieces, (len(part.text) for part in found))
        segments: list[Segment] = []
        for part, stretch in zip(found, stretches, strict=True):
            if part.kind == "document":
                segments.append(part)
            else:
                for piece in stretch:
                    segments += self.split(piece.text, piece.kind, piece.name)
        return segments

    def _forget(self, document: str) -> None:
        bucket = self._buckets[document[:ANCHOR_CHARS]]
        del bucket[bisect_left(bucket, document)]
        if not bucket:
            del self._buckets[document[:ANCHOR_CHARS]]


class WrittenIndex:
    """What templates wrote, found again word for word.

    Thread-safe. Keeps digests and lengths, never text, of the last `max_texts` texts.
    """

    def __init__(self, max_texts: int = 32_768) -> None:
        self._max_texts = max_texts
        self._spans: OrderedDict[bytes, list[_Span]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, text: str, values: Mapping[str, str], sources: Sequence[str]) -> None:
        """Remember a text.

        values: that were filled in, by variable. Every place where one stands is the value's,
            longer ones first, so that data never counts as template text.
        sources: what templates say. What is not a value and stands word for word in one is template
            text; the rest may be anything.
        """
        parts: list[tuple[str, str | None]] = [(text, None)]
        for name, value in sorted(values.items(), key=lambda item: -len(item[1])):
            if len(value) >= _MIN_VALUE_CHARS:
                cut = (_cut_out(value, name, *part) for part in parts)
                parts = list(chain.from_iterable(cut))
        ends = accumulate(len(part) for part, _ in parts)
        spans = [
            (end, name is None and any(part in source for source in sources), name)
            for end, (part, name) in zip(ends, parts, strict=True)
        ]
        digest = _digest(text)
        with self._lock:
            self._spans[digest] = spans
            self._spans.move_to_end(digest)
            while len(self._spans) > self._max_texts:
                self._spans.popitem(last=False)

    def pieces(self, text: str, kind: SegmentKind) -> list[Segment]:
        """Cut a text into template text (`literal`), values (`argument`) and the rest (`kind`).

        Returns: segments whose texts join to `text`.
        """
        with self._lock:
            spans = self._spans.get(_digest(text), [(len(text), False, None)])
        starts = [0, *(end for end, _, _ in spans)]
        return [
            Segment(
                text[start:end], "literal" if is_literal else "argument" if name else kind, name
            )
            for start, (end, is_literal, name) in zip(starts, spans, strict=False)
            if end > start
        ]


def in_stretches(segments: Iterable[Segment], lengths: Iterable[int]) -> Iterator[list[Segment]]:
    """Cut segments into stretches of so many characters each; linear in the text.

    Raises: RuntimeError: the segments have fewer characters.
    """
    todo = iter(segments)
    segment, at = Segment(""), 0
    for length in lengths:
        stretch: list[Segment] = []
        while length:
            if at == len(segment.text):
                segment, at = next(todo), 0
                continue
            part = segment.text[at : at + length]
            stretch.append(replace(segment, text=part))
            at += len(part)
            length -= len(part)
        yield stretch


def settle(segments: Iterable[Segment], text: str) -> Prompt:
    """Make a prompt of `segments`; of the plain `text` if they don't join to exactly that.

    Neighbours of the same kind and name become one, documents apart. Spaces before a boundary move
    after it, because tokenizers make the space a part of the word that follows: "Question: " and
    "Where" are read as "Question:" and " Where". Documents are never touched.

    Raises: PromptError: `text` is empty.
    """
    given = [segment for segment in segments if segment.text]
    if "".join(segment.text for segment in given) != text:
        return Prompt.from_text(text)
    return Prompt(_merge(_move_spaces(given)))


def holds_markup(text: SegmentTokenizer, segments: Iterable[Segment]) -> bool:
    """Return whether a prompt is a chat's rendering already, by what stands outside of its data."""
    return any(text.holds_chat_markup(s.text) for s in segments if s.is_markup)


def as_data(text: SegmentTokenizer, segments: Iterable[Segment]) -> list[Segment]:
    """Return the parts of what a user says: none of them marks a role."""
    return [
        replace(s, kind="argument")
        if s.kind == "text" or (s.kind == "literal" and text.holds_special(s.text))
        else s
        for s in segments
    ]


def _cut_out(
    value: str, name: str, text: str, owner: str | None
) -> Iterator[tuple[str, str | None]]:
    """Cut a variable's value out of text that has no owner yet.

    A single word is not cut out of a longer one.
    """
    start = 0
    found = text.find(value) if owner is None else -1
    while found >= 0:
        end = found + len(value)
        around = text[found - 1 : found] + text[end : end + 1]
        if not (value.isalnum() and any(char.isalnum() for char in around)):
            yield text[start:found], None
            yield value, name
            start = end
        found = text.find(value, end)
    yield text[start:], owner


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _find(bucket: list[str], rest: str) -> tuple[str, int]:
    """The document of a sorted `bucket` that `rest` begins with, and how much of it is there.

    A whole document goes before one that is cut off: its state is more likely stored. If there is
    none: an empty text, and how many characters had to be compared.
    """
    after = bisect_right(bucket, rest)
    # Nothing between the two neighbours in sorting order agrees longer with the rest than they do.
    neighbours = bucket[max(after - 1, 0) : after + 1]
    best = max(neighbours, key=lambda document: common_prefix_chars(document, rest))
    agreed = common_prefix_chars(best, rest)
    if whole := _longest_beginning(bucket, rest[:agreed]):
        return whole, len(whole)
    ends_text = agreed == len(rest)
    if ends_text or (2 * agreed >= len(best) and not rest[agreed].isalnum()):
        return best, agreed
    return "", agreed


def _longest_beginning(bucket: list[str], text: str) -> str | None:
    """Return the longest document of a sorted `bucket` that `text` begins with."""
    while text:
        after = bisect_right(bucket, text)
        if not after:
            return None
        before = bucket[after - 1]
        agreed = common_prefix_chars(before, text)
        if agreed == len(before):
            return before
        text = text[:agreed]
    return None


def common_prefix_chars(left: str, right: str) -> int:
    """Return how many characters both begin with; by bisection, as comparing slices is fast."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _move_spaces(segments: Iterable[Segment]) -> list[Segment]:
    moved: list[Segment] = []
    for segment in segments:
        if moved and "document" not in (moved[-1].kind, segment.kind):
            previous = moved.pop()
            kept = previous.text.rstrip(" ")
            spaces = previous.text[len(kept) :]
            moved.append(replace(previous, text=kept))
            segment = replace(segment, text=spaces + segment.text)
        moved.append(segment)
    return moved


def _merge(segments: Iterable[Segment]) -> list[Segment]:
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if not segment.text:
            continue
        if (
            last is not None
            and segment.kind != "document"
            and (last.kind, last.name) == (segment.kind, segment.name)
        ):
            merged[-1] = replace(last, text=last.text + segment.text)
        else:
            merged.append(segment)
    return merged
