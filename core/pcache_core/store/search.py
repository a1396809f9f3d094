"""Finding states by their tokens, in the stores that can list what they hold."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pcache_core.key import KeySpace, ModuleKey
from pcache_core.store.base import ModuleStore
from pcache_core.store.disk import DiskStore
from pcache_core.store.inspect import Selection, stored_states
from pcache_core.store.tiered import TieredStore


def find_in_folders(
    store: ModuleStore, space: KeySpace, texts: Collection[tuple[int, ...]]
) -> Iterator[ModuleKey]:
    """Keys of the states of these token sequences in a store's folders.

    They may have been written by any process, behind any opening: their files say what they are.
    Memory and servers are not searched. Reads every file's header once.

    Raises: StoreError: a folder can't be read.
    """
    selection = Selection(model=space.model, namespace=space.namespace)
    for disk in _disks(store):
        if not disk.path.is_dir():  # removed under a running process: nothing is stored there
            continue
        for state in stored_states(disk.path, selection):
            record = state.record
            if record is not None and record.token_ids in texts:
                yield ModuleKey(record.digest, record.token_ids)


def _disks(store: ModuleStore) -> Iterator[DiskStore]:
    if isinstance(store, DiskStore):
        yield store
    elif isinstance(store, TieredStore):
        for tier in store.tiers:
            yield from _disks(tier)
