"""Finding states by their tokens, in the stores that can list what they hold."""

from __future__ import annotations

from collections.abc import Container, Iterator

from pcache_core.kv.key import KeySpace, ModuleKey
from pcache_core.store.base import ModuleStore
from pcache_core.store.disk import DiskStore
from pcache_core.store.inspect import Selection, stored_states
from pcache_core.store.memory import MemoryStore
from pcache_core.store.tiered import TieredStore


def find_stored(
    store: ModuleStore, space: KeySpace, texts: Container[tuple[int, ...]] | None = None
) -> Iterator[ModuleKey]:
    """Keys of the states of these token sequences, or of all, in a store's memory and folders.

    They may have been written by any process, after any preamble: they say what they are. Servers
    are not searched. Reads every file's header once.

    Raises: StoreError: a folder can't be read.
    """
    if isinstance(store, TieredStore):
        for tier in store.tiers:
            yield from find_stored(tier, space, texts)
    elif isinstance(store, MemoryStore):
        for key in store.held_keys():
            if key.space == space and (texts is None or key.token_ids in texts):
                yield key
    elif isinstance(store, DiskStore) and store.path.is_dir():  # it may have been removed meanwhile
        for state in stored_states(
            store.path, Selection(model=space.model, namespace=space.namespace)
        ):
            record = state.record
            if record is not None and (texts is None or record.token_ids in texts):
                yield ModuleKey(record.digest, record.token_ids)
