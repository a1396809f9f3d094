"""From a prompt to token runs: which may come from states, which must be computed. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pcache_core.prompt import Prompt, Segment


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
    opening: how many of them are the constant opening, a beginning-of-sequence token included.
    num_bos: 1 if the first id is a beginning-of-sequence token, else 0.
    """

    token_ids: tuple[int, ...]
    pieces: tuple[Piece, ...]
    opening: int
    num_bos: int

    @property
    def anchor_ids(self) -> tuple[int, ...]:
        """What this prompt's modules are encoded behind."""
        return self.token_ids[: self.opening]

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """The anchor of modules that were encoded before any opening was known."""
        return self.token_ids[: self.num_bos]


def tokenise(
    prompt: Prompt, ids_of: Callable[[Segment], Sequence[int]], bos_ids: Sequence[int]
) -> TokenisedPrompt:
    """Tokenise a prompt segment by segment (invariant 2 of the design)."""
    token_ids = list(bos_ids)
    pieces = []
    for segment in prompt.segments:
        start = len(token_ids)
        token_ids.extend(ids_of(segment))
        pieces.append(Piece(segment, start, len(token_ids)))
    num_opening = len(prompt.opening)
    opening = pieces[num_opening - 1].stop if num_opening else len(bos_ids)
    return TokenisedPrompt(tuple(token_ids), tuple(pieces), opening, len(bos_ids))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A run of the prompt that a state may fill: rows `start … stop`.

    is_opening: it is the constant opening itself, which has no anchor.
    """

    start: int
    stop: int
    is_opening: bool = False


def candidates(
    tokens: TokenisedPrompt, *, min_module_tokens: int, min_literal_tokens: int
) -> list[Candidate]:
    """The opening, each document and each long literal, in the prompt's order.

    The last token is never part of one: something must be computed to have logits.
    """
    last = len(tokens.token_ids) - 1
    found = []
    if 0 < tokens.opening <= last:
        found.append(Candidate(0, tokens.opening, is_opening=True))
    least = {"document": min_module_tokens, "literal": min_literal_tokens}
    for piece in tokens.pieces:
        needed = least.get(piece.segment.kind)
        if needed is None or piece.start < tokens.opening or piece.stop > last:
            continue
        if piece.stop - piece.start >= needed:
            found.append(Candidate(piece.start, piece.stop))
    return found


def computed_rows(total: int, filled: Sequence[tuple[int, int]]) -> list[int]:
    """Rows of a prompt of `total` tokens that no filled range holds."""
    rows: list[int] = []
    next_row = 0
    for start, stop in sorted(filled):
        rows.extend(range(next_row, start))
        next_row = stop
    rows.extend(range(next_row, total))
    return rows
