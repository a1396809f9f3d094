"""Which state goes first when room is needed."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol


class EvictionPolicy(Protocol):
    """Orders the states of one store. Called under the store's lock; not shared by stores."""

    def used(self, digest: str, *, num_tokens: int, nbytes: int) -> None:
        """A state was added or used again. num_tokens: what making it anew would cost."""

    def removed(self, digest: str) -> None:
        """A state is gone; unknown digests are ignored."""

    def victim(self) -> str:
        """The state that goes first. Raises: LookupError: there is none."""


class LeastRecentlyUsed:
    """The state goes first whose last use is longest ago."""

    def __init__(self) -> None:
        self._order: OrderedDict[str, None] = OrderedDict()

    def used(self, digest: str, *, num_tokens: int, nbytes: int) -> None:
        """Make it the most recent."""
        self._order[digest] = None
        self._order.move_to_end(digest)

    def removed(self, digest: str) -> None:
        """Forget it."""
        self._order.pop(digest, None)

    def victim(self) -> str:
        """The least recent."""
        if not self._order:
            raise LookupError("no states")
        return next(iter(self._order))


@dataclass(slots=True)
class _Rank:
    priority: float
    uses: int
    order: int


class CostAware:
    """The state goes first that saves the fewest tokens of work for the bytes it takes.

    Greedy-Dual-Size-Frequency (Cherkasova, HP Labs report 98-69): a state is worth its uses, times
    the tokens it would take to make again, by its bytes; what was worth more than the states given
    up lately stays, so that former favourites go in the end. States of one model and dtype have as
    many bytes a token: among them, uses and age decide.
    """

    def __init__(self) -> None:
        self._ranks: dict[str, _Rank] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._floor = 0.0
        self._count = 0

    def used(self, digest: str, *, num_tokens: int, nbytes: int) -> None:
        """Count a use."""
        known = self._ranks.get(digest)
        uses = 1 + (known.uses if known else 0)
        self._count += 1
        rank = _Rank(self._floor + uses * num_tokens / max(nbytes, 1), uses, self._count)
        self._ranks[digest] = rank
        heapq.heappush(self._heap, (rank.priority, rank.order, digest))
        if len(self._heap) > 4 * len(self._ranks) + 64:
            self._heap = [(r.priority, r.order, d) for d, r in self._ranks.items()]
            heapq.heapify(self._heap)

    def removed(self, digest: str) -> None:
        """Forget it."""
        self._ranks.pop(digest, None)

    def victim(self) -> str:
        """The state of least worth; what is added from now on is worth at least as much."""
        while self._heap:
            priority, order, digest = self._heap[0]
            rank = self._ranks.get(digest)
            if rank is not None and rank.order == order:
                self._floor = priority
                return digest
            heapq.heappop(self._heap)
        raise LookupError("no states")
