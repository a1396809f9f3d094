"""States that several running requests use: held once, attended to where they lie."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection
from weakref import WeakValueDictionary

from pcache_core.key import ModuleKey
from pcache_core.kv import KVState


class StatesInUse:
    """Which states the running requests use. Thread-safe.

    A request that is alone with a state copies it into its slot, where attention is fastest. One
    that comes while another uses the state leaves it where it lies: no copy, and one product serves
    the queries of all who do.
    """

    def __init__(self) -> None:
        self._users: Counter[ModuleKey] = Counter()
        self._states: WeakValueDictionary[str, KVState] = WeakValueDictionary()
        self._lock = threading.Lock()

    def enter(self, keys: Collection[ModuleKey]) -> bool:
        """Note that a request uses these states; whether another uses one of them by now."""
        with self._lock:
            is_shared = any(self._users[key] for key in keys)
            self._users.update(keys)
            return is_shared

    def leave(self, keys: Collection[ModuleKey]) -> None:
        """The request is done."""
        with self._lock:
            self._users.subtract(keys)
            self._users = +self._users  # without those that nobody uses

    def find(self, digest: str) -> KVState | None:
        """The state of this digest that requests have on loan, if any has."""
        return self._states.get(digest)

    def one(self, digest: str, state: KVState) -> KVState:
        """The object that all requests are to have on loan, where a store gives each its own."""
        return self._states.setdefault(digest, state)
