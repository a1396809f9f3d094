"""Sequences of finished requests, kept so that a prompt that starts alike continues them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from weakref import WeakSet, WeakValueDictionary

from pcache_core.kv.sequence import COMPUTED, NO_WEIGHTS, KVSequence
from pcache_core.kv.state import KVState
from pcache_core.lm import CausalLM
from pcache_core.request import Request
from pcache_core.threads import renew_in_child

_ROUND_UP = 64

Accepts = Callable[[int, str], bool]
"""Whether a row of the new prompt may be served by a row with this label."""


class PrefixCache:
    """Hands out sequences and keeps those of the last requests.

    A row can be taken over when every row up to it holds the same token in the same position, and
    either was computed with full sight or came from a state that the new prompt uses in the same
    place. Repaired rows were chosen by a question, so they serve only a prompt that continues
    after that question. Weights that have changed make every row useless.

    budget_bytes: how much finished sequences may hold; the one that finished last is kept whatever
        its size. Thread-safe.
    """

    def __init__(self, lm: CausalLM, budget_bytes: int) -> None:
        self._lm = lm
        self._budget_bytes = budget_bytes
        self._idle: list[KVSequence] = []  # least recently used first
        self._lent: WeakValueDictionary[str, KVState] = WeakValueDictionary()
        self._lent_weights = 0
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """Forget other threads' requests: in a forked child, there are none."""
        # Weak: what an interrupted request could not give back is gone with it.
        self._running: WeakSet[KVSequence] = WeakSet()
        self._lock = threading.Lock()

    @contextmanager
    def sequence(self, request: Request) -> Iterator[KVSequence]:
        """Lend a sequence that holds as long a start of the prompt as possible.

        The last token is never taken over: it has to be computed for its logits. When the
        request ends, its rows may serve others; none does if it failed before they were filled.
        """
        sequence = self._acquire(request)
        try:
            yield sequence
        finally:
            self._release(sequence, request)

    def clear(self) -> None:
        """Forget the sequences of finished requests, and of running ones when these end."""
        with self._lock:
            self._idle.clear()
            for sequence in self._running:
                sequence.weights = NO_WEIGHTS

    @property
    def nbytes(self) -> int:
        """Keys and values of running requests, in bytes; what they share counts once."""
        with self._lock:
            in_use = [sequence.buffers for sequence in self._running]
        shared = {id(loan.state): loan.state.nbytes for buffers in in_use for loan in buffers.loans}
        return sum(buffers.nbytes for buffers in in_use) + sum(shared.values())

    def _acquire(self, request: Request) -> KVSequence:
        if self._lm.support.kind == "no-cache":
            return KVSequence(
                self._lm.new_buffers, self._lm.new_buffers(0), stock=self._lm.stock_run()
            )
        uses = frozenset(planned.key.digest for planned in request.states)
        with self._lock:
            self._idle = [other for other in self._idle if other.weights >= request.weights]
            lends = self._lm.lends and any(uses & other.uses for other in self._running)
            # What is on loan needs no room; should it turn out not to be there, the buffers grow.
            lent = sum(state.num_rows for state in request.states if not state.is_opening)
            capacity = request.capacity - (lent if lends else 0)
            best, rows = self._best_match(request)
            # Continuing in place forgets the rows beyond, so those have to be the fewer.
            if best and best.buffers.capacity >= capacity and 2 * rows >= len(best.token_ids):
                sequence = best
                self._idle.remove(best)
            else:
                held = 0 if best is None else best.buffers.index(rows)
                sequence = self._new(max(capacity, held), keep=best)
                if best is not None:
                    sequence.copy_from(best, rows)
            sequence.weights, sequence.uses = request.weights, uses
            sequence.lender = self._lender(request.weights) if lends else None
            sequence.is_filled = False
            self._running.add(sequence)
        sequence.shorten(whole_prefix(request, rows))
        return sequence

    def _lender(self, weights: int) -> WeakValueDictionary[str, KVState]:
        """States on loan; where weights changed under a request, its own stay with it."""
        if self._lent_weights != weights:
            self._lent_weights, self._lent = weights, WeakValueDictionary()
        return self._lent

    def _release(self, sequence: KVSequence, request: Request) -> None:
        """Keep the sequence, emptied if nothing in it may serve another request.

        One that was not filled is not kept at all: an interrupt may have left a forward at work on
        its buffers.
        """
        if sequence.stock is not None:
            return
        sequence.lender = None
        is_unstable = self._lm.support.is_beyond_stable(sequence.end)
        if request.reuse == "off" or is_unstable:
            sequence.shorten(0)
        weights = self._lm.weights_version
        with self._lock:
            self._running.discard(sequence)
            if not sequence.is_filled or sequence.weights != weights:
                return
            self._idle.insert(len(self._idle) if sequence.token_ids else 0, sequence)
            while len(self._idle) > 1 and self._idle_nbytes > self._budget_bytes:
                del self._idle[0]

    @property
    def _idle_nbytes(self) -> int:
        return sum(sequence.nbytes for sequence in self._idle)

    def _best_match(self, request: Request) -> tuple[KVSequence | None, int]:
        accepts = _filter(request)
        token_ids, positions = list(request.tokens.token_ids), list(request.tokens.positions)
        best, rows, start = None, 0, token_ids[:1]
        # Among equals the one used last: the oldest may have to give its buffers.
        for sequence in reversed(self._idle):
            if sequence.weights != request.weights:
                continue  # a request that began before the weights changed
            if sequence.token_ids[: len(start)] != start:
                continue  # of many sequences, few can hold more than the best so far
            alike = min(len(sequence.token_ids), len(token_ids) - request.fresh_rows)
            alike = _common(sequence.token_ids, token_ids, alike)
            alike = _common(sequence.positions, positions, alike)
            if not _continues(sequence, token_ids, positions, request.repair):
                labels = sequence.labels
                alike = next((row for row in range(alike) if not accepts(row, labels[row])), alike)
            if alike > rows:
                best, rows, start = sequence, alike, token_ids[: alike + 1]
        return best, rows

    def _new(self, capacity: int, keep: KVSequence | None) -> KVSequence:
        """Fresh memory is slow to touch, so an emptied sequence gives its buffers.

        So does the oldest, when all is full. keep: whose rows are still needed.
        """
        capacity = -(-capacity // _ROUND_UP) * _ROUND_UP
        is_full = self._idle_nbytes + capacity * self._lm.bytes_per_token > self._budget_bytes
        for sequence in self._idle:
            may_give = sequence is not keep and (is_full or not sequence.token_ids)
            if may_give and sequence.buffers.capacity >= capacity:
                self._idle.remove(sequence)
                sequence.shorten(0)
                return sequence
        return KVSequence(self._lm.new_buffers, self._lm.new_buffers(capacity))


def whole_prefix(request: Request, rows: int) -> int:
    """Return how many of the first `rows` rows to take over, so that none ends inside a module.

    Modules may lie in one another, so that leaving one out may cut into another. The opening is
    plain text from the first row on: it is kept in part, unless its state saves more than half.
    """
    cut = [state for state in request.states if state.start < rows < state.stop]
    while cut:
        if cut == [state for state in cut if state.is_opening]:
            return rows if 2 * rows >= cut[0].stop else 0
        rows = min(state.start for state in cut)
        cut = [state for state in request.states if state.start < rows < state.stop]
    return rows


def _filter(request: Request) -> Accepts:
    """Which rows of an earlier sequence may serve: computed ones, or from a state that is planned.

    Where states are repaired, computed ones alone: repair starts from states, not from what
    earlier questions made of them.
    """
    if request.reuse == "off":
        return lambda row, label: False
    digests: set[tuple[int, str]] = set()
    for planned in () if request.repair is not None else request.states:
        for start, stop in planned.runs:
            digests.update(zip(range(start, stop), repeat(planned.key.digest)))
    return lambda row, label: label == COMPUTED or (row, label) in digests


def _common(one: list[int], other: list[int], most: int) -> int:
    """Return how many of the first `most` numbers are equal; by bisection, as slices are fast."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _continues(
    sequence: KVSequence, token_ids: list[int], positions: list[int], repair: float | None
) -> bool:
    """Return whether the prompt is the one that rows were repaired for, or goes on after it."""
    # 1.0 is a share of all, and an integer is a number of tokens.
    if repair is None or sequence.repair != repair or type(sequence.repair) is not type(repair):
        return False
    count = sequence.repaired_for
    return (
        sequence.token_ids[:count] == token_ids[:count]
        and sequence.positions[:count] == positions[:count]
    )
