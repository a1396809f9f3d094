"""Where states are kept between requests."""

from pcache_core.store.base import BatchStore, Hit, ModuleStore, StoreStats, Tier, get_many
from pcache_core.store.disk import DiskStore
from pcache_core.store.memory import MemoryStore

__all__ = [
    "BatchStore",
    "DiskStore",
    "Hit",
    "MemoryStore",
    "ModuleStore",
    "StoreStats",
    "Tier",
    "get_many",
]
