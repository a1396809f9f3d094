"""States in memory, within a budget."""

from __future__ import annotations

import threading
from collections import OrderedDict

from pcache_core.errors import BudgetError
from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import KVState
from pcache_core.report import StoreStats
from pcache_core.store.base import Counters, Hit
from pcache_core.threads import fork_safe

DEFAULT_BUDGET_BYTES = 2 * 2**30


def check_budget(budget_bytes: object) -> int:
    """Return the budget. Raises: BudgetError: it is not a positive integer."""
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int) or budget_bytes <= 0:
        raise BudgetError(
            f"budget_bytes={budget_bytes!r} must be a positive number of bytes; "
            f"the default is {DEFAULT_BUDGET_BYTES:,}"
        )
    return budget_bytes


class MemoryStore:
    """A byte-bounded store in this process's memory, on the device the states were made on.

    The state whose last use is longest ago goes first when room is needed. One larger than the
    whole budget is not kept; nothing is evicted for it.

    Raises: BudgetError: `budget_bytes` is not a positive integer.
    """

    def __init__(self, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> None:
        self._budget_bytes = check_budget(budget_bytes)
        # Least recently used first.
        self._states: OrderedDict[str, tuple[ModuleKey, KVState]] = OrderedDict()
        self._nbytes = 0
        self._counters = Counters("memory", self._budget_bytes)
        self._lock = fork_safe(threading.Lock())

    def get(self, key: ModuleKey) -> Hit | None:
        """Return the state if it is there and holds the key's tokens; it counts as used."""
        with self._lock:
            _, state = self._states.get(key.digest, (key, None))
            if state is None or state.token_ids != key.token_ids:
                self._counters.add(misses=1)
                return None
            self._states.move_to_end(key.digest)
            self._counters.add(hits=1)
            return Hit(state, "memory")

    def put(self, key: ModuleKey, state: KVState) -> bool:
        """Keep the state, evicting others for it; False if it can't ever fit."""
        if state.nbytes > self._budget_bytes:
            return False
        with self._lock:
            self._remove(key.digest)
            while self._nbytes + state.nbytes > self._budget_bytes:
                self._remove(next(iter(self._states)))
                self._counters.add(evictions=1)
            self._states[key.digest] = (key, state)
            self._nbytes += state.nbytes
        return True

    def contains(self, key: ModuleKey) -> bool:
        """Return whether the state is there."""
        with self._lock:
            return key.digest in self._states

    def delete(self, key: ModuleKey) -> None:
        """Forget the state if it is there."""
        with self._lock:
            self._remove(key.digest)

    def held_keys(self) -> list[ModuleKey]:
        """Return the keys of all states."""
        with self._lock:
            return [key for key, _ in self._states.values()]

    def stats(self) -> StoreStats:
        """Counts so far."""
        with self._lock:
            return self._counters.stats(len(self._states), self._nbytes)

    def _remove(self, digest: str) -> None:
        if digest in self._states:
            _, state = self._states.pop(digest)
            self._nbytes -= state.nbytes
