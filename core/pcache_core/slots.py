"""Slots of finished requests, kept so that a prompt that starts alike continues them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pcache_core.kv import Slot
from pcache_core.params import RepairPolicy

COMPUTED = ""
"""Label of a row that is what computing it with full sight of exact rows would give."""

REPAIRED = "*"
"""Label of a row that was computed again, or behind such a row; see `Lease.repair`."""

_ROUND_UP = 64


@dataclass(slots=True, eq=False)
class Lease:
    """A slot in use by one request.

    token_ids, positions, labels: what its filled rows hold, where they stand and what they came
    from: `COMPUTED`, `REPAIRED`, or the digest of the state they were filled from.
    repair, repaired_for: the policy that repaired rows, and the length of the prompt whose
    question chose them.
    """

    slot: Slot
    token_ids: list[int]
    positions: list[int]
    labels: list[str]
    repair: RepairPolicy | None = None
    repaired_for: int = 0

    def take_back(self, rows: Sequence[int], make_slot: Callable[[int], Slot]) -> None:
        """Let the slot itself hold those of the rows that are on loan, to be computed."""
        loans = self.slot.loans
        lent = [row for row in rows if any(loan.start <= row < loan.stop for loan in loans)]
        if lent:
            self.reserve(len(self.token_ids), make_slot, more=len(lent))
            self.slot.take_back(lent, len(self.token_ids))

    def reserve(self, rows: int, make_slot: Callable[[int], Slot], *, more: int = 0) -> None:
        """Move to a larger slot if the prompt's first `rows` rows, and `more`, need it."""
        needed = self.slot.index(rows) + more
        if needed > self.slot.capacity:
            larger = make_slot(max(needed, 2 * self.slot.capacity))
            larger.copy_rows(self.slot, len(self.token_ids))
            larger.loans = self.slot.loans  # also of rows that are not filled yet
            self.slot = larger

    @property
    def end(self) -> int:
        """One behind the largest position in use: where a token goes that is generated."""
        return max(self.positions, default=-1) + 1

    def append(self, token_id: int, position: int, label: str) -> None:
        """Note what the next row holds."""
        self.token_ids.append(token_id)
        self.positions.append(position)
        self.labels.append(label)

    def shorten(self, rows: int) -> None:
        """Forget all but the first rows."""
        del self.token_ids[rows:], self.positions[rows:], self.labels[rows:]
        self.slot.shorten(rows)


Accepts = Callable[[int, str], bool]
"""Whether a row of the new prompt may be served by a row with this label."""


class SlotPool:
    """Keeps the slots of the last requests.

    A row can be taken over when every row up to it holds the same token in the same position, and
    either was computed with full sight or came from a state that the new prompt uses in the same
    place. Repaired rows were chosen by a question, so they serve only a prompt that continues
    behind that question.
    """

    def __init__(self, make_slot: Callable[[int], Slot], max_idle: int) -> None:
        self._make_slot = make_slot
        self._max_idle = max_idle
        self._idle: list[Lease] = []  # least recently used first
        self._running: set[Lease] = set()
        self._lock = threading.Lock()

    def acquire(
        self,
        token_ids: Sequence[int],
        accepts: Accepts,
        capacity: int,
        repair: RepairPolicy | None = None,
        positions: Sequence[int] | None = None,
    ) -> Lease:
        """A slot for `capacity` rows that holds as long a start of the prompt as possible.

        positions: of the tokens; their rows if they follow each other without a gap.
        The last token is never taken over: it has to be computed for its logits.
        """
        with self._lock:
            wanted = list(zip(token_ids, positions or range(len(token_ids)), strict=True))
            best, rows = self._best_match(wanted, accepts, repair)
            if best is not None and self._may_continue(best, rows, capacity):
                self._idle.remove(best)
                lease = best
                lease.shorten(rows)
            else:
                held = 0 if best is None else best.slot.index(rows)
                lease = Lease(self._buffer(max(capacity, held), keep=best), [], [], [])
                if best is not None:
                    lease.slot.copy_rows(best.slot, rows)
                    lease.token_ids, lease.labels = best.token_ids[:rows], best.labels[:rows]
                    lease.positions = best.positions[:rows]
                    lease.repair, lease.repaired_for = best.repair, best.repaired_for
            if REPAIRED not in lease.labels:
                lease.repair, lease.repaired_for = None, 0
            self._running.add(lease)
            return lease

    def release(self, lease: Lease) -> None:
        """Give a slot back; its rows may serve a later request. An empty one goes first."""
        with self._lock:
            self._running.discard(lease)
            self._idle.insert(len(self._idle) if lease.token_ids else 0, lease)
            if len(self._idle) > self._max_idle:
                del self._idle[0]

    @property
    def nbytes(self) -> int:
        """Keys and values of running requests, in bytes; what they share counts once."""
        with self._lock:
            slots = [lease.slot for lease in self._running]
        shared = {id(loan.state): loan.state.nbytes for slot in slots for loan in slot.loans}
        return sum(slot.nbytes for slot in slots) + sum(shared.values())

    def _best_match(
        self, wanted: Sequence[_Token], accepts: Accepts, repair: RepairPolicy | None
    ) -> tuple[Lease | None, int]:
        best, rows = None, 0
        for lease in self._idle:
            if _continues(lease, wanted, repair):
                matching = _alike(lease, wanted)
            else:
                matching = _matching_rows(lease, wanted, accepts)
            if matching > rows:
                best, rows = lease, matching
        return best, rows

    @staticmethod
    def _may_continue(lease: Lease, rows: int, capacity: int) -> bool:
        """Continuing in place forgets the rows beyond, so those have to be the fewer."""
        return lease.slot.capacity >= capacity and 2 * rows >= len(lease.token_ids)

    def _buffer(self, capacity: int, keep: Lease | None) -> Slot:
        """Fresh memory is slow to touch, so a full pool gives its oldest buffer that is enough."""
        if len(self._idle) >= self._max_idle:
            for lease in self._idle:
                if lease is not keep and lease.slot.capacity >= capacity:
                    self._idle.remove(lease)
                    lease.shorten(0)
                    return lease.slot
        return self._make_slot(-(-capacity // _ROUND_UP) * _ROUND_UP)


_Token = tuple[int, int]
"""A token's id and position."""


def _alike(lease: Lease, wanted: Sequence[_Token]) -> int:
    """Rows from the first on that hold the prompt's tokens, whatever they came from."""
    most = min(len(lease.token_ids), len(wanted) - 1)
    held = zip(lease.token_ids[:most], lease.positions, strict=False)
    pairs = zip(held, wanted, strict=False)
    return next((row for row, (mine, theirs) in enumerate(pairs) if mine != theirs), most)


def _matching_rows(lease: Lease, wanted: Sequence[_Token], accepts: Accepts) -> int:
    alike = _alike(lease, wanted)
    return next((row for row in range(alike) if not accepts(row, lease.labels[row])), alike)


def _continues(lease: Lease, wanted: Sequence[_Token], repair: RepairPolicy | None) -> bool:
    """Whether the prompt is the one that rows were repaired for, or goes on behind it."""
    if repair is None or lease.repair != repair:
        return False
    count = lease.repaired_for
    held = zip(lease.token_ids[:count], lease.positions[:count], strict=True)
    return list(held) == list(wanted[:count])
