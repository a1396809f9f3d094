"""Rendered text that knows which place in the template wrote which part of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from pcache_core.prompt import Segment, SegmentKind
from pcache_templates.tree import Path, Place

SpanKind = Literal["literal", "argument", "document", "text"]


class Span(NamedTuple):
    """A stretch of `chars` characters. path: of the place that wrote it."""

    chars: int
    kind: SpanKind
    path: Path = ()


class Traced(str):
    """A plain string in every respect, with the spans it is made of.

    Whatever a template does to it gives a plain string again, which is then traced as a value.
    """

    spans: tuple[Span, ...]

    def __new__(cls, text: str, spans: Iterable[Span] = ()) -> Traced:
        """Attach `spans`, whose characters add up to the length of `text`."""
        traced = super().__new__(cls, text)
        traced.spans = tuple(spans)
        return traced

    def cut(self) -> Iterator[tuple[Span, str]]:
        """Yield the spans, each with its text."""
        text = str(self)
        position = 0
        for span in self.spans:
            yield span, text[position : position + span.chars]
            position += span.chars


def literal(path: Path, text: str) -> Traced:
    """Trace template text."""
    return Traced(text, [Span(len(text), "literal", path)])


def value(path: Path, text: str, kind: SpanKind = "argument") -> Traced:
    """Trace the text of a value; if it is traced itself, its places lie inside of `path`."""
    if isinstance(text, Traced):
        return Traced(str(text), [span._replace(path=path + span.path) for span in text.spans])
    return Traced(text, [Span(len(text), kind, path)])


def concat(parts: Iterable[str]) -> Traced:
    """Join strings; what is not traced is `text`."""
    pieces = list(parts)
    spans: list[Span] = []
    for piece in pieces:
        if isinstance(piece, Traced):
            spans += piece.spans
        elif isinstance(piece, str):
            spans.append(Span(len(piece), "text"))
    return Traced("".join(pieces), spans)


def strip(traced: Traced) -> Traced:
    """Return the text without the white space around it."""
    text = str(traced)
    start = len(text) - len(text.lstrip())
    end = start + len(text.strip())
    spans: list[Span] = []
    position = 0
    for span in traced.spans:
        kept = min(position + span.chars, end) - max(position, start)
        spans.append(span._replace(chars=max(kept, 0)))
        position += span.chars
    return Traced(text[start:end], spans)


def segments_of(traced: Traced, places: Mapping[Path, Place]) -> list[Segment]:
    """Cut a traced text into segments named as in the schema.

    A literal has its module's name, a value its parameter's. Neighbours that are alike become one,
    documents apart. The texts join to the traced one.
    """
    found: list[tuple[SegmentKind, str | None, list[str]]] = []
    for span, text in traced.cut():
        kind, name = _named(span, places)
        if found and kind != "document" and found[-1][:2] == (kind, name):
            found[-1][2].append(text)
        elif text:
            found.append((kind, name, [text]))
    return [Segment("".join(texts), kind, name) for kind, name, texts in found]


def _named(span: Span, places: Mapping[Path, Place]) -> tuple[SegmentKind, str | None]:
    place = place_of(span.path, places)
    if place is None:
        return span.kind, None
    kind: SegmentKind = place.kind if place.param and span.kind == "argument" else span.kind
    return kind, place.param or place.module


def place_of(path: Path, places: Mapping[Path, Place]) -> Place | None:
    """Return the innermost place that the schema knows of."""
    for end in range(len(path), 0, -1):
        if path[:end] in places:
            return places[path[:end]]
    return None
