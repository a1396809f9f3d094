"""Stores from the text that names one: `memory`, a folder's path or a server's URL."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from pcache_core.errors import OptionError
from pcache_core.params import StorageDtype, check_storage_dtype

if TYPE_CHECKING:
    from pcache_core.store import LastingStore, ModuleStore


def check_store(spec: str, storage_dtype: str = "auto") -> None:
    """Whether `build_store` takes `spec`. No folder is made and no server is asked.

    Raises: OptionError: it does not. DependencyError: a package it needs is not installed.
    """
    check_storage_dtype(storage_dtype)
    if not isinstance(spec, str) or not spec.strip():
        raise OptionError(
            f"store={spec!r} must be 'memory', a folder's path, 'redis://host:port/database' or "
            "the URL of an object store such as 's3://bucket/folder'"
        )
    if "://" in spec:
        _remote_store(spec)
    elif spec != "memory" and get_close_matches(spec.lower(), ["memory"], cutoff=0.75):
        raise OptionError(f"store={spec!r}: did you mean 'memory'? A folder is './{spec}'")


def build_store(spec: str, storage_dtype: str = "auto") -> ModuleStore:
    """Return the store that `spec` names: memory alone, or memory before a folder or a server.

    storage_dtype: how the folder or server keeps numbers; memory keeps what comes.

    Raises: OptionError, DependencyError: as `check_store`. StoreError: the folder can't be made.
    """
    from pcache_core.store import MemoryStore, TieredStore

    check_store(spec)
    if spec == "memory":
        return MemoryStore()
    return TieredStore([MemoryStore(), lasting_store(spec, storage_dtype)])


def lasting_store(spec: str, storage_dtype: str = "auto") -> LastingStore:
    """Return the folder or server alone: what `put` returned for is there when the process ends.

    Raises: OptionError: `spec` names memory, or is refused by `check_store`. DependencyError: as
        `check_store`. StoreError: the folder can't be made.
    """
    check_store(spec)
    if spec == "memory":
        raise OptionError(
            "store='memory' ends with this process; give a folder such as ./states, "
            "redis://host:port/database or an object store's URL"
        )
    dtype = check_storage_dtype(storage_dtype)
    if "://" in spec:
        return _remote_store(spec, dtype)
    from pcache_core.store import DiskStore

    return DiskStore(spec, storage_dtype=dtype)


def _remote_store(url: str, storage_dtype: StorageDtype = "auto") -> LastingStore:
    """Return a store that connects when it is first used; its package is imported only here."""
    if url.partition("://")[0] in ("redis", "rediss", "valkey", "unix"):
        from pcache_core.store.redis import RedisStore

        return RedisStore(url, storage_dtype=storage_dtype)
    from pcache_core.store.object import ObjectStore

    return ObjectStore(url, storage_dtype=storage_dtype)
