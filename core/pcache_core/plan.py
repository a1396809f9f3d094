"""From a prompt to token runs: which may come from states, which must be computed. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pcache_core.passage import Passage
from pcache_core.prompt import Placement, Prompt, Segment, Unit

RowRange = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """A segment's tokens and their place: rows `start … stop` of the prompt."""

    segment: Segment
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TokenisedPrompt:
    """The prompt's ids: a beginning-of-sequence token if the model has one, then the segments'.

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
    def anchor_ids(self) -> tuple[int, ...]:
        """What this prompt's modules are encoded behind."""
        return self.token_ids[: self.opening]

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """The anchor of modules that were encoded before any opening was known."""
        return self.token_ids[: self.num_bos]

    @property
    def end(self) -> int:
        """One behind the largest position."""
        return max(self.positions, default=-1) + 1


def tokenise(
    prompt: Prompt, ids_of: Callable[[Segment], Sequence[int]], bos_ids: Sequence[int]
) -> TokenisedPrompt:
    """Tokenise a prompt segment by segment (invariant 2 of the design)."""
    placement = prompt.placement
    ids = map(ids_of, prompt.segments) if placement is None else placement.token_ids
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


@dataclass(frozen=True, slots=True)
class Candidate:
    """Rows of the prompt that one state may fill.

    runs: row ranges, in the order of the state's tokens; each run's positions have no gap.
    passage: what the state is encoded from. position: of its first token in the prompt.
    anchors: what it may have been encoded behind, best first.
    is_opening: it is the constant opening itself, which has no anchor.
    """

    runs: tuple[RowRange, ...]
    passage: Passage
    position: int
    anchors: tuple[tuple[int, ...], ...]
    is_opening: bool = False

    @property
    def start(self) -> int:
        """The first row."""
        return min(start for start, _ in self.runs)

    @property
    def stop(self) -> int:
        """One behind the last row; others may lie between."""
        return max(stop for _, stop in self.runs)


def candidates(
    tokens: TokenisedPrompt, *, min_module_tokens: int, min_literal_tokens: int
) -> list[Candidate]:
    """The opening, each document and each long literal or a schema's units, in the prompt's order.

    The last token is never part of one: something must be computed to have logits.
    """
    least = {"document": min_module_tokens}
    if tokens.units is None:
        least["literal"] = min_literal_tokens
    found = [_opening(tokens)] if tokens.opening else []
    for piece in tokens.pieces:
        needed = least.get(piece.segment.kind)
        if needed is None or piece.start < tokens.opening:
            continue
        if piece.stop - piece.start >= needed:
            found.append(_document(tokens, piece))
    units = (_unit(tokens, unit) for unit in tokens.units or ())
    found.extend(unit for unit in units if _num_rows(unit.runs) >= min_module_tokens)
    last = len(tokens.token_ids) - 1
    return sorted((c for c in found if c.stop <= last), key=lambda candidate: candidate.start)


def _opening(tokens: TokenisedPrompt) -> Candidate:
    return Candidate(((0, tokens.opening),), Passage(tokens.anchor_ids), 0, ((),), is_opening=True)


def _document(tokens: TokenisedPrompt, piece: Piece) -> Candidate:
    return Candidate(
        ((piece.start, piece.stop),),
        Passage(tokens.token_ids[piece.start : piece.stop]),
        tokens.positions[piece.start],
        (tokens.anchor_ids, tokens.bos_ids),
    )


def _unit(tokens: TokenisedPrompt, unit: Unit) -> Candidate:
    pieces = [tokens.pieces[index] for index in unit.segments]
    runs = tuple((piece.start, piece.stop) for piece in pieces)
    return Candidate(runs, unit.passage, unit.position, (tokens.anchor_ids,))


def _num_rows(runs: Iterable[RowRange]) -> int:
    return sum(stop - start for start, stop in runs)


def computed_rows(total: int, filled: Sequence[RowRange]) -> list[int]:
    """Rows of a prompt of `total` tokens that no filled range holds."""
    rows: list[int] = []
    next_row = 0
    for start, stop in sorted(filled):
        rows.extend(range(next_row, start))
        next_row = stop
    rows.extend(range(next_row, total))
    return rows
