"""Online: which states a prompt uses, getting them, and filling a slot with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pcache_core.admission import Declined
from pcache_core.encode import Module
from pcache_core.key import ModuleKey
from pcache_core.kv import KVState, Loan, Rows, Slot
from pcache_core.library import Found, ModuleLibrary
from pcache_core.lm import CausalLM, place
from pcache_core.plan import Candidate, Piece, TokenisedPrompt
from pcache_core.report import Report, SegmentReport, Source
from pcache_core.sharing import StatesInUse
from pcache_core.slots import COMPUTED, Accepts, Lease

_FEWEST_LENT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Wanted:
    """A run of the prompt and the keys of the states that may fill it, best first."""

    candidate: Candidate
    module: Module
    keys: tuple[ModuleKey, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Filling:
    """A state, what it was encoded from, and the rows it goes to.

    exact: it is what computing these rows would give, having been encoded behind the very tokens
    that stand before them.
    """

    module: Module
    candidate: Candidate
    found: Found
    exact: bool


def wanted(
    tokens: TokenisedPrompt, candidates: Sequence[Candidate], library: ModuleLibrary
) -> list[Wanted]:
    """Name the states that a prompt's candidates may be filled from."""
    result = []
    for candidate in candidates:
        passage, place = candidate.passage, candidate.position
        encoded_at = 0 if candidate.is_opening else library.encoding_position(tokens.opening, place)
        keys = [library.key(anchor, passage, place) for anchor in candidate.anchors]
        module = Module(passage, encoded_at)
        result.append(Wanted(candidate, module, tuple(dict.fromkeys(keys))))
    return result


def module_tokens(wishes: Sequence[Wanted]) -> int:
    """Tokens of all modules, the opening not counted."""
    runs = (run for w in wishes if not w.candidate.is_opening for run in w.candidate.runs)
    return sum(stop - start for start, stop in runs)


def row_filter(wishes: Sequence[Wanted]) -> Accepts:
    """Which rows of an earlier slot may serve: computed ones, or from a state that is wanted.

    Without wishes, or where states are repaired, computed ones alone.
    """
    digests: dict[int, set[str]] = {}
    for wish in wishes:
        names = {key.digest for key in wish.keys}
        for start, stop in wish.candidate.runs:
            digests.update(dict.fromkeys(range(start, stop), names))
    nothing: set[str] = set()
    return lambda row, label: label == COMPUTED or label in digests.get(row, nothing)


def keep_whole_modules(lease: Lease, wishes: Sequence[Wanted]) -> None:
    """Shorten a slot's prefix so that it ends inside no module.

    The opening may be cut anywhere: it is plain text from the first row on. Modules may lie in one
    another, so that leaving one out may cut into another.
    """
    modules = [wish.candidate for wish in wishes if not wish.candidate.is_opening]
    cut = [module.start for module in modules if _is_cut(module, len(lease.token_ids))]
    while cut:
        lease.shorten(min(cut))
        cut = [module.start for module in modules if _is_cut(module, len(lease.token_ids))]


def _is_cut(module: Candidate, end: int) -> bool:
    return module.start < end < module.stop


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """What the states of a prompt's wishes turned out to be.

    fillings: by first row. placed: those whose rows are in the slot already.
    declined: wishes whose state is there but takes longer to load than to compute.
    """

    fillings: tuple[Filling, ...]
    placed: frozenset[Filling]
    declined: tuple[tuple[Wanted, Declined], ...]


NOTHING = Loaded((), frozenset(), ())


def load(
    tokens: TokenisedPrompt,
    wishes: Sequence[Wanted],
    library: ModuleLibrary,
    lease: Lease,
    lender: StatesInUse | None = None,
) -> Loaded:
    """Find the states, encode those that are missing (together), and say which rows they fill.

    A state that is not in memory is read right into its rows, or into memory where it may stay on
    loan from `lender`: what is damaged shows then, and is encoded with the missing. The opening is
    used when its state is there or has to be made as an anchor; it is not worth a forward of its
    own.
    """
    fillings, declined = [], []
    reader = _Reader(library, lease, tokens, lender)
    missing: dict[ModuleKey, list[Wanted]] = {}
    opening: Wanted | None = None

    for wish, found in zip(wishes, library.find_all([w.keys for w in wishes]), strict=True):
        if isinstance(found, Declined):
            declined.append((wish, found))
            continue
        filling = reader.read(_filling(tokens, wish, found)) if found else None
        if filling:
            fillings.append(filling)
        elif wish.candidate.is_opening:
            opening = wish
        else:
            missing.setdefault(wish.keys[0], []).append(wish)
    anchor = library.anchor(tokens.anchor_ids) if missing else None
    modules = {key: wishes[0].module for key, wishes in missing.items()}
    for key, made in library.encode(anchor, modules):
        fillings.extend(_filling(tokens, wish, made) for wish in missing[key])
    if opening is not None and anchor is not None:
        fillings.append(_filling(tokens, opening, anchor))
    fillings.sort(key=lambda filling: filling.candidate.start)
    return Loaded(tuple(fillings), frozenset(reader.placed), tuple(declined))


class _Reader:
    """Reads states that are not in memory: into their rows, or into memory to be on loan.

    placed: what is in its rows.
    """

    def __init__(
        self,
        library: ModuleLibrary,
        lease: Lease,
        tokens: TokenisedPrompt,
        lender: StatesInUse | None,
    ) -> None:
        self.placed: set[Filling] = set()
        self._library = library
        self._lease = lease
        self._tokens = tokens
        self._lender = lender
        self._damaged: set[str] = set()

    def read(self, filling: Filling) -> Filling | None:
        """The filling, its state read if it was not in memory; None for what is damaged."""
        digest = filling.found.digest
        if filling.found.opened is None:
            return filling
        usable = None
        if digest not in self._damaged:
            usable = self._into_memory(filling) if self._lender else self._into_rows(filling)
        if usable is None:
            self._damaged.add(digest)
        return usable

    def _into_rows(self, filling: Filling) -> Filling | None:
        def place(rows: Rows) -> None:
            _place(self._library.lm, self._lease, self._tokens, filling, rows)

        if not self._library.read(filling.found, place):
            return None
        self.placed.add(filling)
        return filling

    def _into_memory(self, filling: Filling) -> Filling | None:
        assert self._lender is not None
        found = filling.found
        state = self._lender.find(found.digest)  # read by a request that has it on loan
        if state is not None and found.opened is not None:
            found.opened.settle(0.0, None)
            return replace(filling, found=Found(state, found.source, found.digest))
        whole = self._library.whole(found)
        return None if whole is None else replace(filling, found=whole)


def _filling(tokens: TokenisedPrompt, wish: Wanted, found: Found) -> Filling:
    candidate = wish.candidate
    is_plain = len(candidate.runs) == 1 and not candidate.passage.shape
    behind_anchor = candidate.start == tokens.opening and found.digest == wish.keys[0].digest
    in_place = candidate.position == wish.module.position
    exact = candidate.is_opening or (is_plain and behind_anchor and in_place)
    return Filling(wish.module, candidate, found, exact)


def lend(
    lender: StatesInUse, lease: Lease, tokens: TokenisedPrompt, loaded: Loaded
) -> frozenset[Filling]:
    """Let states serve their rows from where they lie; those that do."""
    lent = [f for f in loaded.fillings if f not in loaded.placed and _may_stay(f, lease.slot)]
    for filling in lent:
        start, state = filling.candidate.start, filling.found.state.whole()
        state = lender.one(filling.found.digest, state)
        lease.slot.loans.append(Loan(state, start, tokens.positions[start]))
    return frozenset(lent)


def _may_stay(filling: Filling, slot: Slot) -> bool:
    """Whether a state is one run of rows, long enough to be worth a product of its own."""
    state, candidate = filling.found.state, filling.candidate
    return (
        isinstance(state, KVState)
        and not candidate.is_opening
        and len(candidate.runs) == 1
        and not candidate.passage.shape
        and state.num_tokens >= _FEWEST_LENT_TOKENS
        and state.keys[0].device == slot.positions.device
    )


def fill(
    lm: CausalLM,
    lease: Lease,
    tokens: TokenisedPrompt,
    loaded: Loaded,
    lent: frozenset[Filling] = frozenset(),
) -> None:
    """Copy the other states into their rows, moved to their positions."""
    for filling in loaded.fillings:
        if filling not in loaded.placed and filling not in lent:
            _place(lm, lease, tokens, filling, filling.found.state)


def _place(
    lm: CausalLM, lease: Lease, tokens: TokenisedPrompt, filling: Filling, state: Rows
) -> None:
    """Raises: StateMismatchError: it was damaged where it is kept."""
    rotations = lm.support.rotations or (None,) * len(lm.layers)
    for part, row in _parts(filling, state):
        place(lease.slot, lease.slot.index(row), part, rotations, tokens.positions[row])


def _parts(filling: Filling, rows: Rows) -> Iterator[tuple[Rows, int]]:
    """A state's runs, each of which follows itself without a gap, and their first rows."""
    passage = filling.module.passage
    if len(filling.candidate.runs) == 1:
        yield rows, filling.candidate.start
        return
    state = rows.whole()
    # Where the tokens stood that are kept, the first of them where the state says.
    offsets = [passage.positions(0)[index] for index in passage.kept]
    first = state.position - offsets[0]
    done = 0
    for start, stop in filling.candidate.runs:
        yield state.part(done, done + stop - start, first + offsets[done]), start
        done += stop - start


def describe(tokens: TokenisedPrompt, prefix: int, loaded: Loaded, reuse: str) -> Report:
    """The request's report, times still zero and nothing repaired."""
    sources: list[Source] = ["computed"] * len(tokens.token_ids)
    sources[:prefix] = ["prefix"] * prefix
    notes = [""] * len(tokens.token_ids)
    for wish, declined in loaded.declined:
        for start, stop in wish.candidate.runs:
            notes[start:stop] = [str(declined)] * (stop - start)
    for filling in loaded.fillings:
        for start, stop in filling.candidate.runs:
            sources[start:stop] = [filling.found.source] * (stop - start)
            notes[start:stop] = [""] * (stop - start)
    encoded, computed = sources.count("encoded"), sources.count("computed")
    return Report(
        segments=tuple(_segment(piece, sources, notes) for piece in tokens.pieces),
        prompt_tokens=len(sources),
        cached_tokens=len(sources) - encoded - computed,
        encoded_tokens=encoded,
        computed_tokens=computed,
        reuse=reuse,
        not_loaded_tokens=len(notes) - notes.count(""),
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


def _segment(piece: Piece, sources: Sequence[Source], notes: Sequence[str]) -> SegmentReport:
    here = sources[piece.start : piece.stop]
    return SegmentReport(
        kind=piece.segment.kind,
        name=piece.segment.name,
        text=piece.segment.text,
        num_tokens=len(here),
        source=max(dict.fromkeys(here), key=here.count) if here else "computed",
        note=max(notes[piece.start : piece.stop], default=""),
    )
