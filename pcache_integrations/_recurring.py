"""Text that comes back, for prompts that nobody announced: no callback, no known template.

Two things are learnt, both at second sight and within the process. Blocks between blank lines
that came before are documents. What different prompts share at their ends is the text they were
made around, and so template text. Neither changes a prompt: not its text, and not its token ids,
which are compared before a cut is made.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

from pcache_core.prompt import Segment, SegmentKind
from pcache_integrations._mapping import ANCHOR_CHARS, common_prefix_chars

Ids = Callable[[Segment], Sequence[int]]
"""The token ids of a segment alone."""

_MIN_TOKENS = 8
# A remembered block takes about a hundred bytes, an end of a prompt twice its text.
_MAX_BLOCKS = 65_536
_MAX_ENDS = 512
_MAX_END_CHARS = 8_000
_MAX_CUE_CHARS = 40
_BLANK_LINES = re.compile(r"[^\S\n]*\n\s*\n")
_NEWLINES = re.compile(r"\s*\n\s*")


@dataclass(slots=True)
class _End:
    """One end of the prompts of a making: what all of them begin and end with there.

    seen: what the last one had there, and at its other end if that tells prompts apart.
    varies: not all had the same.
    """

    start: str
    end: str
    seen: tuple[str, str]
    varies: bool = False


class RecurringText:
    """Finds text again that came before. Thread-safe, bounded; of blocks it keeps digests only."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[bytes, None] = OrderedDict()
        self._ends: OrderedDict[str, _End] = OrderedDict()
        self._lock = threading.Lock()

    def split(self, segments: Sequence[Segment], ids: Ids) -> list[Segment]:
        """Cut what came before out of unexplained segments.

        What is data stays that: a cut that made a special token of it would change the ids.

        Returns: segments whose texts join to the same prompt, and whose ids do.
        """
        found = self._cut_frame(list(segments), ids)
        cut = [
            part
            for number, segment in enumerate(found)
            for part in self._cut_blocks(
                segment, ids, is_first=number == 0, is_last=number == len(found) - 1
            )
        ]
        return self._cut_tail(cut, ids)

    def _cut_blocks(
        self, segment: Segment, ids: Ids, *, is_first: bool, is_last: bool
    ) -> list[Segment]:
        if segment.kind not in ("text", "argument"):
            return [segment]
        blocks = list(_blocks(segment.text))
        if segment.kind == "argument" and len(blocks) < 2:
            return [segment]  # a question asked again is no document
        if segment.kind == "text" and is_last:
            blocks = blocks[:-1]  # where the question stands
        elif segment.kind == "argument" and segment.name is None and is_first:
            blocks = blocks[1:]  # where the instructions stand
        known = self._note(segment.text[start:stop] for start, stop in blocks)
        again = [
            block
            for block, is_known in zip(blocks, known, strict=True)
            if is_known and len(ids(Segment(segment.text[slice(*block)]))) >= _MIN_TOKENS
        ]
        for ranges in _variants(again, segment.text) if again else ():
            parts = list(_cut(segment, ranges, "document"))
            if _same_ids(segment, parts, ids):
                return parts
        return [segment]

    def _note(self, blocks: Iterable[str]) -> list[bool]:
        """Remember blocks; whether each came before, in another prompt or earlier in this one."""
        known = []
        with self._lock:
            for block in blocks:
                if len(block) < ANCHOR_CHARS or block.endswith("?"):
                    known.append(False)
                    continue
                digest = _digest(block)
                known.append(digest in self._blocks)
                self._blocks[digest] = None
                self._blocks.move_to_end(digest)
            while len(self._blocks) > _MAX_BLOCKS:
                self._blocks.popitem(last=False)
        return known

    def _cut_frame(self, segments: list[Segment], ids: Ids) -> list[Segment]:
        """Cut template text out of the prompt's start."""
        first = segments[0]
        if not _is_unexplained(first):
            return segments
        start, end = self._shared("start", first.text, segments)
        # What ends a prompt without documents is looked at with its last block.
        shared = (start, end if len(segments) > 1 else "")
        return [*_framed(first, shared, ids), *segments[1:]]

    def _cut_tail(self, segments: list[Segment], ids: Ids) -> list[Segment]:
        """Cut template text out of the prompt's last block."""
        last = segments[-1]
        if not _is_unexplained(last):
            return segments
        begin = _last_block(last.text)
        shared = self._shared("end", last.text[begin:], segments)
        if begin and any(shared):
            whole = [replace(last, text=last.text[:begin]), replace(last, text=last.text[begin:])]
            if not _same_ids(last, whole, ids):
                return segments
            return [*segments[:-1], whole[0], *_framed(whole[1], shared, ids)]
        return [*segments[:-1], *_framed(last, shared, ids)]

    def _shared(
        self, place: Literal["start", "end"], text: str, segments: Sequence[Segment]
    ) -> tuple[str, str]:
        """What prompts of the same making begin and end with at that place of theirs.

        Prompts are of the same making if they have their first line, or their last, in common.
        """
        whole = "".join(segment.text for segment in segments).strip()
        keys = (whole.partition("\n")[0], whole.rpartition("\n")[2])
        if place == "start":
            other, is_whole = _spoken(segments).removeprefix(text), len(segments) > 1
        else:
            # The question may stand at the end and come again; not so in "Answer:".
            other, is_whole = _spoken(segments).removesuffix(text), _is_cue(text)
        best = ("", "")
        for number, key in enumerate(keys):
            with self._lock:
                end = self._end(f"{place} {number} {key[:_MAX_END_CHARS]}", text, other)
                shared = _shared_parts(end, text, is_whole=is_whole)
            best = max(best, shared, key=lambda pair: len(pair[0]) + len(pair[1]))
        return best

    def _end(self, key: str, text: str, other: str) -> _End:
        """What is known of this end, with this prompt taken into account."""
        first, last = text[:_MAX_END_CHARS], text[-_MAX_END_CHARS:]
        known = self._ends.get(key)
        if known is None:
            known = self._ends[key] = _End(first, last, (text, other))
            while len(self._ends) > _MAX_ENDS:
                self._ends.popitem(last=False)
        self._ends.move_to_end(key)
        known.varies |= known.seen != (text, other)
        known.seen = (text, other)
        known.start = known.start[: common_prefix_chars(known.start, first)]
        agreed = common_prefix_chars(known.end[::-1], last[::-1])
        known.end = known.end[len(known.end) - agreed :]
        return known


def _shared_parts(end: _End, text: str, *, is_whole: bool) -> tuple[str, str]:
    if not end.varies:
        return "", ""
    if end.start == text:
        return (text, "") if is_whole else ("", "")
    start = _to_boundary(end.start)
    return start, _from_boundary(end.end, len(text) - len(start))


def _framed(segment: Segment, shared: tuple[str, str], ids: Ids) -> list[Segment]:
    start, end = shared
    for head, tail in ((start, end), (start, ""), ("", end)):
        stop = len(segment.text) - len(tail)
        ranges = [r for r in ((0, len(head)), (stop, len(segment.text))) if r[0] < r[1]]
        parts = list(_cut(segment, ranges, "literal"))
        if ranges and _same_ids(segment, parts, ids):
            return parts
    return [segment]


def _blocks(text: str) -> Iterator[tuple[int, int]]:
    """The stretches between blank lines, without white space around them."""
    position = 0
    for gap in [*_BLANK_LINES.finditer(text), None]:
        stop = gap.start() if gap else len(text)
        block = text[position:stop]
        start = position + len(block) - len(block.lstrip())
        if block.strip():
            yield start, start + len(block.strip())
        position = gap.end() if gap else stop


def _last_block(text: str) -> int:
    """Where the last block begins, the blank lines before it included."""
    gaps = list(_BLANK_LINES.finditer(text.rstrip()))
    return gaps[-1].start() if gaps else 0


def _variants(blocks: Sequence[tuple[int, int]], text: str) -> Iterator[list[tuple[int, int]]]:
    """Ways to cut: blocks alone, with the blank lines behind them, with those before them.

    Tokenizers have newlines in common with different neighbours.
    """
    yield list(blocks)
    gaps = list(_NEWLINES.finditer(text))
    behind = {gap.start(): gap.end() for gap in gaps}
    before = {gap.end(): gap.start() for gap in gaps}
    yield [(start, behind.get(stop, stop)) for start, stop in blocks]
    yield [(before.get(start, start), stop) for start, stop in blocks]


def _cut(
    segment: Segment, ranges: Iterable[tuple[int, int]], kind: SegmentKind
) -> Iterator[Segment]:
    position = 0
    for start, stop in ranges:
        if start > position:
            yield replace(segment, text=segment.text[position:start])
        yield Segment(segment.text[start:stop], kind)
        position = stop
    if position < len(segment.text):
        yield replace(segment, text=segment.text[position:])


def _same_ids(segment: Segment, parts: Sequence[Segment], ids: Ids) -> bool:
    return tuple(ids(segment)) == tuple(chain.from_iterable(map(ids, parts)))


def _spoken(segments: Sequence[Segment]) -> str:
    """What tells a prompt from one that asks the same.

    Documents don't, where the question may stand before them. In a chat it is a message of its own.
    """
    is_chat = segments[0].kind == "argument"
    return "".join(
        segment.text
        for segment in segments
        if segment.text.strip() and (is_chat or segment.kind != "document")
    )


def _is_unexplained(segment: Segment) -> bool:
    return segment.kind == "text" or (segment.kind == "argument" and segment.name is None)


def _is_cue(text: str) -> bool:
    """Whether the text is a few words that something is to follow, such as "Answer:"."""
    line = text.strip()
    return len(line) <= _MAX_CUE_CHARS and line.endswith(":") and "\n" not in line


def _to_boundary(text: str) -> str:
    """The text up to the last place in its first block where template text may end.

    That is a colon or a line's end. Blocks behind the first may be documents.
    """
    block = _BLANK_LINES.search(text, len(text) - len(text.lstrip()))
    text = text[: block.end()] if block else text
    return text[: max(text.rfind("\n"), text.rfind(":")) + 1]


def _from_boundary(text: str, most: int) -> str:
    """The last `most` characters of the text, from the first line's end among them."""
    text = text[max(0, len(text) - most) :]
    begin = text.find("\n")
    return text[begin:] if begin >= 0 else ""


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
