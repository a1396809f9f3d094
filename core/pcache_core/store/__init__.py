"""Where states are kept between requests."""

from pcache_core.report import StoreStats, Tier
from pcache_core.store.base import (
    BatchStore,
    Hit,
    LastingStore,
    ModuleStore,
    Opened,
    OpeningStore,
    get_many,
    open_many,
)
from pcache_core.store.disk import DiskStore
from pcache_core.store.memory import MemoryStore
from pcache_core.store.tiered import TieredStore

__all__ = [
    "BatchStore",
    "DiskStore",
    "Hit",
    "LastingStore",
    "MemoryStore",
    "ModuleStore",
    "Opened",
    "OpeningStore",
    "StoreStats",
    "Tier",
    "TieredStore",
    "get_many",
    "open_many",
]
