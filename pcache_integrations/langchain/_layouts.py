"""Which parts of a rendered prompt are the template's own text, which its variables' values.

A layout holds lengths, never text. A `literal` span is always word for word a part of the
template: only that may count as template text, whatever a value holds. What can't be explained
stays `text`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from langchain_core.documents import Document

from pcache_core.prompt import Segment
from pcache_integrations._segments import fitted
from pcache_integrations.langchain._schema import compiled

# A value of one or two characters occurs in any text by accident.
_MIN_VALUE_CHARS = 3
# Rendered again, these write the same text and change nothing.
_PLAIN = (str, int, float, bool, type(None))


class Span(NamedTuple):
    """A stretch of `chars` characters. name: the variable of an argument.

    `rest` is most likely template text: what is left of a prompt in which all of its values were
    found, or what a string of the caller's explains.
    """

    kind: Literal["literal", "argument", "rest", "text"]
    name: str | None
    chars: int


Layout = tuple[Span, ...]


def rendered_layout(
    source: str, template_format: str, values: Mapping[str, Any], text: str
) -> Layout:
    """How `text` was rendered from a template's source and its values.

    A template with logic runs a second time, so only over values that this can't change.
    """
    if template_format != "f-string" and not _is_plain(values):
        return searched_layout(values, text)
    try:
        candidate = compiled(source, template_format).segments(**values)
    except Exception:  # whatever stops the tracing costs reuse, no more
        return searched_layout(values, text)
    (segments,) = fitted([candidate], [text])
    if [segment.kind for segment in segments] == ["text"]:
        return searched_layout(values, text)
    return tuple(_spans(segments))


def searched_layout(values: Mapping[str, Any], text: str) -> Layout:
    """Find string values in text whose template is unknown; the last place, longest first."""
    found: list[tuple[int, int, str]] = []
    strings = [(name, value) for name, value in values.items() if isinstance(value, str)]
    for name, value in sorted(strings, key=lambda item: -len(item[1])):
        start = text.rfind(value)
        end = start + len(value)
        free = all(end <= taken_start or taken_end <= start for taken_start, taken_end, _ in found)
        if len(value) >= _MIN_VALUE_CHARS and start >= 0 and free:
            found.append((start, end, name))
    rest: Literal["rest", "text"] = "rest" if len(found) == len(values) else "text"
    spans: list[Span] = []
    position = 0
    for start, end, name in sorted(found):
        spans += [Span(rest, None, start - position), Span("argument", name, end - start)]
        position = end
    spans.append(Span(rest, None, len(text) - position))
    return tuple(span for span in spans if span.chars)


def joined_layout(parts: Iterable[tuple[str, Layout]], text: str) -> Layout | None:
    """The layout of a text that joins `parts`, in order, with template text between them.

    None if it does not hold them.
    """
    spans: list[Span] = []
    position = 0
    for part, layout in parts:
        start = text.find(part, position)
        if start < 0:
            return None
        spans += [Span("literal", None, start - position), *layout]
        position = start + len(part)
    spans.append(Span("literal", None, len(text) - position))
    return tuple(span for span in spans if span.chars)


def trimmed_layout(layout: Layout, before: int, after: int) -> Layout:
    """The layout without that many characters at its start and at its end."""
    for chars in (before, after):
        left = chars
        kept: list[Span] = []
        for span in layout:
            cut = min(left, span.chars)
            left -= cut
            if span.chars > cut:
                kept.append(span._replace(chars=span.chars - cut))
        layout = tuple(reversed(kept))
    return layout


def _spans(segments: Iterable[Segment]) -> Iterator[Span]:
    for segment in segments:
        if segment.kind in ("literal", "text"):
            yield Span(segment.kind, None, len(segment.text))
        else:
            # Which part of a value is a document is seen by its content.
            yield Span("argument", segment.name, len(segment.text))


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (*_PLAIN, Document))
