"""Writing states to slow stores while requests go on."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import KVState
from pcache_core.store.base import ModuleStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    key: ModuleKey
    state: KVState
    stores: tuple[ModuleStore, ...]


class WriteBehind:
    """A queue of states and a thread that writes them, oldest first. Thread-safe.

    queue_bytes: how much may wait. Whoever adds more waits for room: nothing is lost but in a
        killed process. A state larger than the queue waits until it is alone.
    """

    def __init__(self, queue_bytes: int) -> None:
        self._queue_bytes = queue_bytes
        self._reset()

    def add(self, key: ModuleKey, state: KVState, stores: Sequence[ModuleStore]) -> None:
        """Have the state written to the stores, soon; waits while the queue is full."""
        with self._changed:
            self._start()
            self._changed.wait_for(lambda: self._has_room(state.nbytes))
            waiting = self._take(key.digest)
            earlier = () if waiting is None else waiting.stores
            targets = tuple(dict.fromkeys((*earlier, *stores)))
            self._items[key.digest] = _Item(key, state, targets)
            self._nbytes += state.nbytes
            self._changed.notify_all()

    def find(self, key: ModuleKey) -> KVState | None:
        """The state if it waits to be written and is of the key's tokens."""
        with self._changed:
            item = self._items.get(key.digest)
        return item.state if item is not None and item.state.token_ids == key.token_ids else None

    def discard(self, key: ModuleKey) -> None:
        """Don't write it; if it is being written, wait until it is."""
        with self._changed:
            if self._first() is self._items.get(key.digest):
                self._wait_until_gone(key.digest)
            self._take(key.digest)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything that waits now is written."""
        with self._changed:
            for digest in list(self._items):
                self._wait_until_gone(digest)

    def close(self) -> None:
        """Write what waits and stop the thread; adding starts it again."""
        if threading.current_thread() is self._thread:
            self._stopping = True  # collected as garbage by the thread itself
            return
        self.flush()
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _reset(self) -> None:
        self._process_id = os.getpid()
        self._condition = threading.Condition()
        self._items: OrderedDict[str, _Item] = OrderedDict()
        self._nbytes = 0
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def _changed(self) -> threading.Condition:
        """Guards everything. A forked child starts anew: what waits is its parent's to write."""
        if self._process_id != os.getpid():
            self._reset()
        return self._condition

    def _has_room(self, nbytes: int) -> bool:
        return not self._items or self._nbytes + nbytes <= self._queue_bytes

    def _first(self) -> _Item | None:
        return next(iter(self._items.values()), None)

    def _wait_until_gone(self, digest: str) -> None:
        item = self._items.get(digest)
        if item is not None:
            self._start()
            self._changed.wait_for(lambda: self._items.get(digest) is not item)

    def _take(self, digest: str) -> _Item | None:
        item = self._items.pop(digest, None)
        if item is not None:
            self._nbytes -= item.state.nbytes
        return item

    def _start(self) -> None:
        """Start the thread if it does not run: at first, and after `close`."""
        self._stopping = False
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="pcache-write", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._stopping)
                item = self._first()
                if item is None:
                    self._thread = None
                    return
            _write(item)
            with self._changed:
                if self._items.get(item.key.digest) is item:
                    self._take(item.key.digest)
                self._changed.notify_all()


def _write(item: _Item) -> None:
    for store in item.stores:
        try:
            store.put(item.key, item.state)
        except Exception:  # a store of the caller's own; the thread has to live on
            logger.exception("a state was not written to %s", type(store).__name__)
