"""Segments of templates held against what a framework renders, shared by the integrations."""

from __future__ import annotations

from collections.abc import Sequence

from pcache_core.prompt import Segment


def fitted(candidates: Sequence[Sequence[Segment]], texts: Sequence[str]) -> list[list[Segment]]:
    """Each of the texts in segments: the candidate's if they join to it, else a single `text`.

    Text that an output parser has put behind a candidate's is `text`, too.
    """
    if len(candidates) != len(texts):
        return [_plain(text) for text in texts]
    return [_fit(segments, text) for segments, text in zip(candidates, texts, strict=True)]


def _fit(segments: Sequence[Segment], text: str) -> list[Segment]:
    traced = "".join(segment.text for segment in segments)
    if not text.startswith(traced):
        return _plain(text)
    return [*segments, *_plain(text[len(traced) :])]


def _plain(text: str) -> list[Segment]:
    return [Segment(text)] if text else []
