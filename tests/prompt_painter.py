"""What each character of a prompt ought to be, from texts that a test knows.

Nothing here knows how the mapping is found: a prompt is painted with documents and questions
wherever they stand in it, and the report is held against that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pcache_core import Report


@dataclass
class Painted:
    """How many documents and questions stand in prompts, and what is wrong with any."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def paint(
    report: Report,
    documents: Mapping[str, str],
    questions: Iterable[str],
) -> Painted:
    """Hold a report against what is known. documents: names by text."""
    canvas = _Canvas(report)
    for part in sorted(documents, key=len, reverse=True):
        canvas.expect("document", part, {("document", documents[part])})
    for part in questions:
        canvas.expect("question", part, {("argument", None), ("text", None)})
    canvas.expect_no_other_documents()
    return canvas.painted


class _Canvas:
    """A prompt, each of whose characters is painted at most once."""

    def __init__(self, report: Report) -> None:
        self.painted = Painted()
        self._text = "".join(segment.text for segment in report.segments)
        self._segments = [segment for segment in report.segments for _ in segment.text]
        self._free = [True] * len(self._text)

    def expect(self, kind: str, part: str, allowed: set[tuple[str, str | None]]) -> None:
        """Wherever the text stands, it is one of the allowed; only documents' names matter."""
        for match in re.finditer(re.escape(part), self._text):
            span = range(*match.span())
            if not all(self._free[i] for i in span):
                continue
            for i in span:
                self._free[i] = False
            self.painted.counts[kind] += 1
            found = {self._kind(i) for i in span}
            if not (len(found) == 1 and found <= allowed):
                self.painted.wrong.append(f"{kind} {part[:40]!r} is {sorted(found, key=str)}")

    def expect_no_other_documents(self) -> None:
        """What was not painted is no document."""
        for i, segment in enumerate(self._segments):
            if segment.kind == "document" and self._free[i] and segment.text.strip():
                self.painted.wrong.append(f"{segment.name}: {segment.text[:40]!r} is no document")
                return

    def _kind(self, i: int) -> tuple[str, str | None]:
        segment = self._segments[i]
        return segment.kind, segment.name if segment.kind == "document" else None
