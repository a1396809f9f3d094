"""Where states are kept between requests."""

from pcache_core.store.base import Hit, ModuleStore, StoreStats, Tier
from pcache_core.store.memory import MemoryStore

__all__ = ["Hit", "MemoryStore", "ModuleStore", "StoreStats", "Tier"]
