"""What a LlamaIndex message says, block by block, and where its caller drew borders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from llama_index.core.base.llms.types import ChatMessage

from pcache_core import Segment
from pcache_core.errors import PromptError
from pcache_core.prompt import SegmentKind

_BETWEEN = "\n"  # as `ChatMessage.content` joins its blocks
# Said elsewhere in the message, or not for the model's eyes. By name, as versions differ in which
# classes they have.
_UNSAID = ("thinking", "tool_call", "citation")


@dataclass(frozen=True, slots=True)
class Piece:
    """A block's text. is_module: its caller marked it as worth keeping. name: its source's."""

    text: str
    is_module: bool = False
    name: str | None = None


def pieces_of(message: ChatMessage) -> list[Piece]:
    """The message's texts. A cache point marks those before it, `cache_control` all of them.

    Raises: PromptError: it holds an image or anything else but text.
    """
    pieces: list[Piece] = []
    for block in message.blocks:
        kind = getattr(block, "block_type", type(block).__name__)
        if kind == "cache":
            pieces = [replace(piece, is_module=True) for piece in pieces]
        elif kind not in _UNSAID:
            pieces.append(_piece(block, kind, message.role.value))
    if message.additional_kwargs.get("cache_control"):
        pieces = [replace(piece, is_module=True) for piece in pieces]
    return pieces


def joined(pieces: Sequence[Piece]) -> str:
    """The message's content."""
    return _BETWEEN.join(piece.text for piece in pieces)


def with_borders(
    segments: Sequence[Segment], pieces: Sequence[Piece], kind: SegmentKind
) -> list[Segment]:
    """Segments of the joined pieces, with each marked piece as a module of its own.

    A marked piece that is known to be template text, or to hold documents, stays what it is.

    kind: of what nothing is known. If that is template text, it ends at the last mark: what stands
        after it was left out because it differs from call to call.
    """
    if not any(piece.is_module for piece in pieces):
        return list(segments)
    lengths = chain.from_iterable((len(_BETWEEN), len(piece.text)) for piece in pieces)
    cut = in_stretches(segments, islice(lengths, 1, None))
    done: list[Segment] = []
    after_mark = False
    for number, piece in enumerate(pieces):
        if number:
            done += next(cut)
        own = next(cut)
        if piece.is_module:
            is_known = any(segment.kind in ("literal", "document") for segment in own)
            done += own if is_known else [Segment(piece.text, "document", piece.name)]
            after_mark = True
        else:
            done += map(_as_data, own) if after_mark and kind == "literal" else own
    return done


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


def _piece(block: Any, kind: str, role: str) -> Piece:
    if kind == "text":
        return Piece(block.text)
    if kind == "citable" and all(inner.block_type == "text" for inner in block.content):
        text = _BETWEEN.join(inner.text for inner in block.content)
        return Piece(text, is_module=True, name=block.source)
    raise PromptError(
        f"a {role} message holds a {type(block).__name__}; "
        "the model reads text only, leave it out or describe it in words"
    )


def _as_data(segment: Segment) -> Segment:
    return replace(segment, kind="argument") if segment.kind == "literal" else segment
