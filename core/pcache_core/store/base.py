"""What the engine asks of a store."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pcache_core.errors import StateMismatchError
from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import KVState, StateSource
from pcache_core.report import StoreStats, Tier


@dataclass(frozen=True, slots=True, eq=False)
class Hit:
    """A state that was found, and the tier it came from."""

    state: KVState
    tier: Tier


@runtime_checkable
class ModuleStore(Protocol):
    """Keeps states by key. Every method may be called from several threads."""

    def get(self, key: ModuleKey) -> Hit | None:
        """The state, or None if it is absent, damaged or holds other tokens than the key's."""

    def put(self, key: ModuleKey, state: KVState) -> bool:
        """Keep the state if it fits; says whether it was kept. The store may evict others."""

    def contains(self, key: ModuleKey) -> bool:
        """Return whether `get` would probably find it. Counts neither as a hit nor as a use."""

    def delete(self, key: ModuleKey) -> None:
        """Forget the state if it is there."""

    def stats(self) -> StoreStats:
        """Counts so far."""


@runtime_checkable
class BatchStore(ModuleStore, Protocol):
    """A store that finds several states faster together than one by one."""

    def get_many(self, keys: Sequence[ModuleKey]) -> list[Hit | None]:
        """Return what `get` would return for each key, in order."""


@runtime_checkable
class LastingStore(ModuleStore, Protocol):
    """A store that outlives the process: a folder, a server."""

    def check(self) -> None:
        """Try to write something small.

        The other methods never raise for a store that does not work, so that requests go on
        without it; this tells a program at its start.

        Raises: StoreError: nothing can be kept there now, and why.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A state that was found and is read when it is used.

    nbytes: as kept. settle: called when it has been read or turned out to be damaged, with the
        milliseconds that reading took: the store counts it, keeps it nearer or drops it.
    """

    rows: StateSource
    tier: Tier
    nbytes: int
    settle: Callable[[float, StateMismatchError | None], None]


@runtime_checkable
class OpeningStore(ModuleStore, Protocol):
    """A store whose states can be read into buffers without a copy in between."""

    def open_many(self, keys: Sequence[ModuleKey]) -> list[Opened | None]:
        """For each key a state that is there, in order.

        keys: each once. Slow reads begin for all of them before this returns.
        """


class OpeningReads(ABC):
    """Reads at once what a store opens."""

    def get(self, key: ModuleKey) -> Hit | None:
        """Return the state if it is there and whole; it counts as used."""
        return read(self.open_many([key])[0])

    def get_many(self, keys: Sequence[ModuleKey]) -> list[Hit | None]:
        """Return what `get` does for each key; the store is asked for all of them at once."""
        unique = list(dict.fromkeys(keys))
        opened = dict(zip(unique, self.open_many(unique), strict=True))
        return [read(opened[key]) for key in keys]

    @abstractmethod
    def open_many(self, keys: Sequence[ModuleKey]) -> list[Opened | None]:
        """Open states, see `OpeningStore`."""


def open_many(store: ModuleStore, keys: Sequence[ModuleKey]) -> list[Opened | None]:
    """Open several states together; those of a store that can't are read by this."""
    if isinstance(store, OpeningStore):
        return store.open_many(keys)

    def opened(key: ModuleKey, hit: Hit) -> Opened:
        def settle(load_ms: float, error: StateMismatchError | None) -> None:
            if error is not None:
                store.delete(key)

        return Opened(hit.state, hit.tier, hit.state.nbytes, settle)

    hits = zip(keys, get_many(store, keys), strict=True)
    return [None if hit is None else opened(key, hit) for key, hit in hits]


def read(opened: Opened | None) -> Hit | None:
    """Read an opened state all at once; None if there is none, or it is damaged."""
    if opened is None:
        return None
    started = time.perf_counter()
    try:
        state = opened.rows.whole()
    except StateMismatchError as error:
        opened.settle(milliseconds_since(started), error)
        return None
    opened.settle(milliseconds_since(started), None)
    return Hit(state, opened.tier)


def milliseconds_since(started: float) -> float:
    """started: of `time.perf_counter`."""
    return (time.perf_counter() - started) * 1000


def get_many(store: ModuleStore, keys: Sequence[ModuleKey]) -> list[Hit | None]:
    """Look several keys up, together where the store can."""
    if isinstance(store, BatchStore):
        return store.get_many(keys)
    return [store.get(key) for key in keys]
