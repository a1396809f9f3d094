"""Which rows of a prompt come from its prefix, from states, or have to be computed. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pcache_core.kv.key import ModuleTokens, PlannedState, RowRange
from pcache_core.kv.sequence import COMPUTED, REPAIRED, KVSequence
from pcache_core.library.states import ModuleLibrary
from pcache_core.params import repair_budget
from pcache_core.prompt import Passage, Piece, TokenisedPrompt
from pcache_core.request import Request

_MIN_LITERAL_TOKENS = 64


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """How a prompt's rows come to be.

    prefix: rows from the first on that the sequence holds already.
    states: fill rows after the prefix. missing: rows that are computed.
    labels: what every row of the prompt holds then, see `KVSequence`.
    stale: rows of states, which were encoded without sight of what stands before them.
    repaired: how many of them are computed again; the question chooses which.
    """

    request: Request
    prefix: int
    states: tuple[PlannedState, ...]
    missing: tuple[int, ...]
    labels: tuple[str, ...]
    stale: tuple[int, ...]
    repaired: int


def plan_prefill(request: Request, sequence: KVSequence) -> PrefillPlan:
    """Decide for each row of a prompt whether prefix, state or forward provides it."""
    tokens, prefix = request.tokens, len(sequence.token_ids)
    modules = [state for state in request.states if not state.is_opening]
    reusable = sum(state.num_rows for state in modules)
    budget = repair_budget(request.repair, reusable)
    # Half of it computed again takes as long as all of it, which is the better answer.
    if budget and 2 * budget >= reusable:
        modules, budget = [], 0
    openings = [state for state in request.states if state.is_opening]
    states = tuple(state for state in (*openings, *modules) if state.start >= prefix)
    missing = _rows_outside(len(tokens.token_ids), [(0, prefix), *_runs(states)])
    labels = [COMPUTED] * len(tokens.token_ids)
    labels[:prefix] = sequence.labels
    for state in modules:
        if state.start >= prefix:
            for start, stop in state.runs:
                labels[start:stop] = [state.key.digest] * (stop - start)
    stale = tuple(row for row, label in enumerate(labels) if label not in (COMPUTED, REPAIRED))
    if sequence.repaired_for == len(tokens.token_ids) == prefix + request.fresh_rows:
        budget = 0  # the very prompt that these rows were repaired for
    repaired = min(int(budget), len(stale))
    return PrefillPlan(request, prefix, states, missing, tuple(labels), stale, repaired)


def plan_states(
    tokens: TokenisedPrompt, library: ModuleLibrary, min_module_tokens: int
) -> tuple[PlannedState, ...]:
    """Name the states that may fill a prompt's rows, in the prompt's order.

    These are the constant opening, each document, each long text of a template and the units of a
    schema. The last token is never part of one: something must be computed to have logits.
    """
    last = len(tokens.token_ids) - 1
    planned = []
    opening = opening_module(tokens, min_module_tokens)
    if opening is not None and tokens.opening <= last:
        rows = (0, tokens.opening)
        planned.append(PlannedState(opening, library.key(opening), (rows,), (0,), is_opening=True))
    is_first = True
    for pieces, passage, position in _candidates(tokens):
        runs = tuple((piece.start, piece.stop) for piece in pieces)
        too_short = sum(b - a for a, b in runs) < _needed(tokens, pieces, min_module_tokens)
        if too_short or max(stop for _, stop in runs) > last:
            continue
        module = library.module(passage, _text(pieces), position, is_first=is_first)
        if module is not None:
            positions = tuple(tokens.positions[start] for start, _ in runs)
            planned.append(PlannedState(module, library.key(module), runs, positions))
            is_first = False
    return tuple(planned)


def opening_module(tokens: TokenisedPrompt, min_module_tokens: int) -> ModuleTokens | None:
    """The constant opening of a prompt, an exact prefix; None if it is shorter than a module."""
    if tokens.opening < min_module_tokens:
        return None
    return ModuleTokens(Passage(tokens.token_ids[: tokens.opening]), (), 0)


def passages_of(tokens: TokenisedPrompt) -> Iterator[tuple[Passage, str, int]]:
    """Yield what may be a module after the opening: tokens, text, position of the first token."""
    for pieces, passage, position in _candidates(tokens):
        yield passage, _text(pieces), position


_Candidate = tuple[tuple[Piece, ...], Passage, int]
"""The segments that a module is of, its tokens, and the position of the first."""


def _candidates(tokens: TokenisedPrompt) -> list[_Candidate]:
    """Return what may be a module, in the prompt's order."""
    kinds = ("document", "literal") if tokens.units is None else ("document",)
    found: list[_Candidate] = [
        (
            (piece,),
            Passage(tokens.token_ids[piece.start : piece.stop]),
            tokens.positions[piece.start],
        )
        for piece in tokens.pieces
        if piece.segment.kind in kinds and tokens.opening <= piece.start < piece.stop
    ]
    for unit in tokens.units or ():
        pieces = tuple(tokens.pieces[index] for index in unit.segments)
        found.append((pieces, unit.passage, unit.position))
    return sorted(found, key=lambda candidate: min(piece.start for piece in candidate[0]))


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.segment.text for piece in pieces)


def _needed(tokens: TokenisedPrompt, pieces: Sequence[Piece], min_module_tokens: int) -> int:
    """Return how many tokens make a module of these segments; a template's text needs more."""
    if tokens.units is None and pieces[0].segment.kind == "literal":
        return _MIN_LITERAL_TOKENS
    return min_module_tokens


def _runs(states: Sequence[PlannedState]) -> list[RowRange]:
    return [run for state in states for run in state.runs]


def _rows_outside(total: int, filled: Sequence[RowRange]) -> tuple[int, ...]:
    """Rows of a prompt of `total` tokens that no filled range holds."""
    rows: list[int] = []
    next_row = 0
    for start, stop in sorted(filled):
        rows.extend(range(next_row, start))
        next_row = max(next_row, stop)
    rows.extend(range(next_row, total))
    return tuple(rows)
