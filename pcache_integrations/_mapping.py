"""Text and known documents → segments, shared by the integrations.

A framework hands over a flat string. Which parts of it are documents is found by content alone, so
it does not matter how the documents travelled from the retriever to the prompt.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from pcache_core.prompt import Prompt, Segment, SegmentKind

if TYPE_CHECKING:
    from pcache_core.lm.tokenizer import SegmentTokenizer

# A document is recognised by its first characters. Shorter ones would be found by accident, and
# have fewer tokens than a module needs anyway.
ANCHOR_CHARS = 24


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
        with self._lock:
            while position <= len(text) - ANCHOR_CHARS:
                bucket = self._buckets.get(text[position : position + ANCHOR_CHARS])
                found = bucket and _find(bucket, text, position)
                if not found:
                    position += 1
                    continue
                document, end = found
                if position > start:
                    segments.append(Segment(text[start:position], kind, name))
                segments.append(Segment(text[position:end], "document", self._names[document]))
                self._names.move_to_end(document)
                start = position = end
        if start < len(text):
            segments.append(Segment(text[start:], kind, name))
        return segments

    def _forget(self, document: str) -> None:
        bucket = self._buckets[document[:ANCHOR_CHARS]]
        del bucket[bisect_left(bucket, document)]
        if not bucket:
            del self._buckets[document[:ANCHOR_CHARS]]


def settle(segments: Iterable[Segment], text: str) -> Prompt:
    """Make a prompt of `segments`; of the plain `text` if they don't join to exactly that.

    Neighbours of the same kind and name become one, documents apart. Spaces before a boundary move
    behind it, because tokenizers make the space a part of the word that follows: "Question: " and
    "Where" are read as "Question:" and " Where". Documents are never touched.

    Raises: PromptError: `text` is empty.
    """
    given = [segment for segment in segments if segment.text]
    if "".join(segment.text for segment in given) != text:
        return Prompt.from_text(text)
    return Prompt(_merge(_move_spaces(given)))


def holds_markup(text: SegmentTokenizer, segments: Iterable[Segment]) -> bool:
    """Whether a prompt is a chat's rendering already, by what stands outside of its data."""
    return any(text.holds_chat_markup(s.text) for s in segments if s.is_markup)


def as_data(text: SegmentTokenizer, segments: Iterable[Segment]) -> list[Segment]:
    """The parts of what a user says: none of them marks a role."""
    return [
        replace(s, kind="argument")
        if s.kind == "text" or (s.kind == "literal" and text.holds_special(s.text))
        else s
        for s in segments
    ]


def _find(bucket: list[str], text: str, position: int) -> tuple[str, int] | None:
    """The document of a sorted `bucket` that stands at `position`, and where it ends there.

    A whole document goes before one that is cut off: its state is more likely stored.
    """
    rest = text[position:]
    after = bisect_right(bucket, rest)
    # Nothing between the two neighbours in sorting order agrees longer with the rest than they do.
    neighbours = bucket[max(after - 1, 0) : after + 1]
    best = max(neighbours, key=lambda document: common_prefix_chars(document, rest))
    agreed = common_prefix_chars(best, rest)
    if whole := _longest_beginning(bucket, rest[:agreed]):
        return whole, position + len(whole)
    ends_text = agreed == len(rest)
    if ends_text or (2 * agreed >= len(best) and not rest[agreed].isalnum()):
        return best, position + agreed
    return None


def _longest_beginning(bucket: list[str], text: str) -> str | None:
    """The longest document of a sorted `bucket` that `text` begins with."""
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
    """How many characters both begin with; by bisection, as comparing slices is fast."""
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
