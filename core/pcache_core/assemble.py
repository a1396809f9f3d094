"""Online: which states a prompt uses, getting them, and filling a slot with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pcache_core.encode import Module
from pcache_core.key import ModuleKey
from pcache_core.library import Found, ModuleLibrary
from pcache_core.lm import CausalLM, place
from pcache_core.plan import Candidate, Piece, TokenisedPrompt
from pcache_core.report import Report, SegmentReport, Source
from pcache_core.slots import COMPUTED, Accepts, Lease


@dataclass(frozen=True, slots=True)
class Wanted:
    """A run of the prompt and the keys of the states that may fill it, best first."""

    candidate: Candidate
    module: Module
    keys: tuple[ModuleKey, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Filling:
    """A state and the rows it goes to.

    exact: it is what computing these rows would give, having been encoded behind the very tokens
    that stand before them.
    """

    candidate: Candidate
    found: Found
    exact: bool


def wanted(
    tokens: TokenisedPrompt, candidates: Sequence[Candidate], library: ModuleLibrary
) -> list[Wanted]:
    """Name the states that a prompt's candidates may be filled from."""
    result = []
    for candidate in candidates:
        token_ids = tokens.token_ids[candidate.start : candidate.stop]
        position = library.encoding_position(tokens.opening, candidate.start)
        anchors = [tokens.anchor_ids, tokens.bos_ids]
        if candidate.is_opening:
            position, anchors = 0, [()]
        keys = [library.key(anchor, token_ids, candidate.start) for anchor in anchors]
        module = Module(token_ids, position)
        result.append(Wanted(candidate, module, tuple(dict.fromkeys(keys))))
    return result


def module_tokens(wishes: Sequence[Wanted]) -> int:
    """Tokens of all modules, the opening not counted."""
    return sum(len(w.module.token_ids) for w in wishes if not w.candidate.is_opening)


def row_filter(wishes: Sequence[Wanted]) -> Accepts:
    """Which rows of an earlier slot may serve: computed ones, or from a state that is wanted.

    Without wishes, or where states are repaired, computed ones alone.
    """
    digests: dict[int, set[str]] = {}
    for wish in wishes:
        names = {key.digest for key in wish.keys}
        digests.update(dict.fromkeys(range(wish.candidate.start, wish.candidate.stop), names))
    nothing: set[str] = set()
    return lambda row, label: label == COMPUTED or label in digests.get(row, nothing)


def keep_whole_modules(lease: Lease, wishes: Sequence[Wanted]) -> None:
    """Shorten a slot's prefix so that it ends inside no module.

    The opening may be cut anywhere: it is plain text from the first row on.
    """
    end = len(lease.token_ids)
    for wish in wishes:
        inside = wish.candidate.start < end < wish.candidate.stop
        if inside and not wish.candidate.is_opening:
            del lease.token_ids[wish.candidate.start :], lease.labels[wish.candidate.start :]
            return


def load(
    tokens: TokenisedPrompt, wishes: Sequence[Wanted], library: ModuleLibrary
) -> list[Filling]:
    """Find the states, encode those that are missing (together), and say which rows they fill.

    The opening is used when its state is there or has to be made as an anchor; it is not worth a
    forward of its own.
    """
    fillings = []
    missing: dict[ModuleKey, list[Wanted]] = {}
    opening: Wanted | None = None
    for wish in wishes:
        if wish.candidate.is_opening:
            opening = wish
        elif found := library.find(wish.keys):
            fillings.append(_filling(tokens, wish, found))
        else:
            missing.setdefault(wish.keys[0], []).append(wish)
    anchor = library.anchor(tokens.anchor_ids) if missing else None
    modules = {key: wishes[0].module for key, wishes in missing.items()}
    for key, found in library.encode(anchor, modules):
        fillings.extend(_filling(tokens, wish, found) for wish in missing[key])
    if opening is not None and (found := anchor or library.find(opening.keys)):
        fillings.append(_filling(tokens, opening, found))
    return sorted(fillings, key=lambda filling: filling.candidate.start)


def _filling(tokens: TokenisedPrompt, wish: Wanted, found: Found) -> Filling:
    candidate = wish.candidate
    behind_anchor = candidate.start == tokens.opening and found.digest == wish.keys[0].digest
    return Filling(candidate, found, candidate.is_opening or behind_anchor)


def fill(lm: CausalLM, lease: Lease, fillings: Sequence[Filling]) -> None:
    """Copy states into their rows, moved to their positions."""
    rotations = lm.support.rotations or (None,) * len(lm.layers)
    for filling in fillings:
        place(lease.slot, filling.candidate.start, filling.found.state, rotations)


def describe(
    tokens: TokenisedPrompt, prefix: int, fillings: Sequence[Filling], reuse: str
) -> Report:
    """The request's report, times still zero and nothing repaired."""
    sources: list[Source] = ["computed"] * len(tokens.token_ids)
    sources[:prefix] = ["prefix"] * prefix
    for filling in fillings:
        start, stop = filling.candidate.start, filling.candidate.stop
        sources[start:stop] = [filling.found.source] * (stop - start)
    encoded, computed = sources.count("encoded"), sources.count("computed")
    return Report(
        segments=tuple(_segment(piece, sources) for piece in tokens.pieces),
        prompt_tokens=len(sources),
        cached_tokens=len(sources) - encoded - computed,
        encoded_tokens=encoded,
        computed_tokens=computed,
        reuse=reuse,
    )


def describe_repair(report: Report, tokens: TokenisedPrompt, rows: Sequence[int]) -> None:
    """Write into a report which rows were computed again."""
    report.repaired_tokens = len(rows)
    again = set(rows)
    segments = []
    for segment, piece in zip(report.segments, tokens.pieces, strict=True):
        count = len(again.intersection(range(piece.start, piece.stop)))
        source = "repaired" if 2 * count > segment.num_tokens else segment.source
        segments.append(replace(segment, repaired_tokens=count, source=source))
    report.segments = tuple(segments)


def _segment(piece: Piece, sources: Sequence[Source]) -> SegmentReport:
    here = sources[piece.start : piece.stop]
    return SegmentReport(
        kind=piece.segment.kind,
        name=piece.segment.name,
        text=piece.segment.text,
        num_tokens=len(here),
        source=max(dict.fromkeys(here), key=here.count) if here else "computed",
    )
