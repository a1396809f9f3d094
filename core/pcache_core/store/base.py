"""What the engine asks of a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from pcache_core.key import ModuleKey
from pcache_core.kv import KVState

Tier = Literal["memory", "disk", "remote"]


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A store's contents and its history since it was made.

    states, nbytes: None where counting them would mean asking a server for every key.
    budget_bytes: None where the store has no limit of its own.
    damaged: entries that were dropped because they were altered, cut or another model's.
    failures: calls that failed because the store could not be reached, read or written.
    load_ms: time spent in look-ups that hit.
    tiers: of a tiered store, each tier's own.
    """

    tier: Tier
    states: int | None
    nbytes: int | None
    budget_bytes: int | None
    hits: int
    misses: int
    evictions: int
    damaged: int = 0
    failures: int = 0
    load_ms: float = 0.0
    tiers: tuple[StoreStats, ...] = ()


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
        """Whether `get` would probably find it. Counts neither as a hit nor as a use."""

    def delete(self, key: ModuleKey) -> None:
        """Forget the state if it is there."""

    def stats(self) -> StoreStats:
        """Counts so far."""


@runtime_checkable
class BatchStore(ModuleStore, Protocol):
    """A store that finds several states faster together than one by one."""

    def get_many(self, keys: Sequence[ModuleKey]) -> list[Hit | None]:
        """What `get` would return for each key, in order."""


def get_many(store: ModuleStore, keys: Sequence[ModuleKey]) -> list[Hit | None]:
    """Look several keys up, together where the store can."""
    if isinstance(store, BatchStore):
        return store.get_many(keys)
    return [store.get(key) for key in keys]
