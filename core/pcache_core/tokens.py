"""A prompt as token ids. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pcache_core.prompt import Placement, Prompt, Segment, Unit

_LEAD_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Piece:
    """A segment's tokens and their place: rows `start … stop` of the prompt."""

    segment: Segment
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TokenisedPrompt:
    """The prompt's ids: a beginning-of-sequence token if the model has one, then the segments'.

    A flat prompt whose markup begins with that token gets no second one.

    token_ids: every segment tokenised alone, joined; the same for every reuse mode.
    positions: of each token. In a flat prompt the token's row; a schema may leave gaps, and let
        tokens share a position. Rows say who sees whom, positions what the model is told.
    opening: how many of them are the constant opening, a beginning-of-sequence token included.
    num_bos: 1 if the first id is a beginning-of-sequence token, else 0.
    units: texts of a schema that are encoded together, by piece; None for a flat prompt.
    """

    token_ids: tuple[int, ...]
    positions: Sequence[int]
    pieces: tuple[Piece, ...]
    opening: int
    num_bos: int
    units: tuple[Unit, ...] | None = None

    @property
    def end(self) -> int:
        """One after the largest position."""
        return max(self.positions, default=-1) + 1

    @property
    def question(self) -> tuple[int, int]:
        """Where the words before the question begin, and where it does itself, as rows.

        The question is the last filled-in or free text behind all documents and modules, and what
        follows it; without such text, all that stands behind them.
        """
        modules = {index for unit in self.units or () for index in unit.segments}
        behind, asked = 0, None
        for index, piece in reversed(list(enumerate(self.pieces))):
            if piece.segment.kind == "document" or index in modules:
                behind = piece.stop
                break
            if asked is None and piece.segment.kind != "literal" and piece.segment.text.strip():
                asked = piece.start
        asked = behind if asked is None else asked
        return max(behind, asked - _LEAD_TOKENS), asked


def tokenise(
    prompt: Prompt, ids_of: Callable[[Segment], Sequence[int]], bos_ids: Sequence[int]
) -> TokenisedPrompt:
    """Tokenise a prompt segment by segment (invariant 2 of the design).

    A text that begins with the beginning-of-sequence token gets no second one.
    """
    placement = prompt.placement
    ids = list(map(ids_of, prompt.segments)) if placement is None else placement.token_ids
    if placement is None and next((tuple(own[:1]) for own in ids if own), None) == tuple(bos_ids):
        bos_ids = ()
    token_ids = list(bos_ids)
    pieces = []
    for segment, own in zip(prompt.segments, ids, strict=True):
        start = len(token_ids)
        token_ids.extend(own)
        pieces.append(Piece(segment, start, len(token_ids)))
    num_opening = len(prompt.opening)
    opening = pieces[num_opening - 1].stop if num_opening else len(bos_ids)
    positions = range(len(token_ids)) if placement is None else _positions(placement, len(bos_ids))
    units = None if placement is None else placement.units
    return TokenisedPrompt(tuple(token_ids), positions, tuple(pieces), opening, len(bos_ids), units)


def _positions(placement: Placement, num_bos: int) -> tuple[int, ...]:
    placed = zip(placement.starts, placement.token_ids, strict=True)
    own = (position for start, ids in placed for position in range(start, start + len(ids)))
    return (*range(num_bos), *own)
