"""What the engine asks of a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from pcache_core.key import ModuleKey
from pcache_core.kv import KVState

Tier = Literal["memory", "disk", "remote"]


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A store's contents and its history since it was made.

    budget_bytes: None where the store has no limit of its own.
    """

    tier: Tier
    states: int
    nbytes: int
    budget_bytes: int | None
    hits: int
    misses: int
    evictions: int


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
