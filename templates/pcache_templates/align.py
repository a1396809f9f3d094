"""Which characters of a joined text are whose, when not all of what was joined is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pcache_templates.trace import Span, SpanKind
from pcache_templates.tree import Path


class Part(NamedTuple):
    """Something that was joined. text: None if it isn't known."""

    kind: SpanKind
    text: str | None


def align(parts: Sequence[Part], text: str, path: Path) -> list[Span]:
    """Cut `text`, which is the parts one after the other, into spans.

    Where an unknown part ends is settled by the texts around it if they leave no choice. If they
    leave one, everything up to the next certain place is a single argument: a value that imitates
    the template never passes for it. So is all of a text that the parts don't fit.

    Returns: spans, with the number of the part behind `path` where it is certain.
    """
    bounds = _certain_bounds(parts, text)
    if bounds is None:
        return [Span(len(text), "argument", path)]
    spans: list[Span] = []
    start, before = 0, 0
    for number, bound in enumerate(bounds):
        if bound is None:
            continue
        alone = number == before
        kind, place = (parts[number].kind, (*path, number)) if alone else ("argument", path)
        spans.append(Span(bound - start, kind, place))
        start, before = bound, number + 1
    return [span for span in spans if span.chars]


def _certain_bounds(parts: Sequence[Part], text: str) -> list[int | None] | None:
    """Return where each part ends, None where there is a choice; None if the parts don't fit.

    A place is certain if the parts before it can reach neither less nor more far: the leftmost and
    the rightmost way to lay out the parts agree on it.
    """
    forward = _leftmost_ends([part.text for part in parts], text)
    mirrored = [part.text and part.text[::-1] for part in reversed(parts)]
    backward = _leftmost_ends(mirrored, text[::-1])
    if forward is None or backward is None:
        return None
    # What ends last from behind begins first from the front.
    latest = [len(text) - end for end in backward[-2::-1]] + [len(text)]
    return [end if end == last else None for end, last in zip(forward, latest, strict=True)]


def _leftmost_ends(texts: Sequence[str | None], text: str) -> list[int] | None:
    """The ends of the parts if unknown ones are as short as can be; None if they don't fit."""
    unknown = [number for number, part in enumerate(texts) if part is None]
    if not unknown:
        return _ends(texts, 0) if "".join(map(str, texts)) == text else None
    # What is known at the end stays there.
    tail = "".join(str(part) for part in texts[unknown[-1] + 1 :])
    limit = len(text) - len(tail)
    ends: list[int] = []
    position = 0
    for first, after in zip([-1, *unknown], [*unknown, len(texts)], strict=True):
        run = "".join(str(part) for part in texts[first + 1 : after])
        is_last = after == len(texts)
        found = limit if is_last else text.find(run, position, limit)
        if found < position or (first < 0 and found != 0) or not text.endswith(tail):
            return None
        if first >= 0:
            ends.append(found)  # of the unknown part before the run
        ends += _ends(texts[first + 1 : after], found)
        position = found + len(run)
    return ends


def _ends(texts: Sequence[str | None], position: int) -> list[int]:
    ends = []
    for text in texts:
        position += len(text or "")
        ends.append(position)
    return ends
