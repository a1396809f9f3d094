"""Writing states to slow stores while requests go on."""

from __future__ import annotations

import _thread
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import KVState
from pcache_core.store.base import ModuleStore
from pcache_core.threads import Flag, renew_in_child

logger = logging.getLogger(__name__)

_LOOK_S = 0.05  # how often a waiting thread looks again


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
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """Begin anew: what waits in a forked child is its parent's to write."""
        self._lock = threading.Lock()  # guards everything; never held while waiting
        self._items: OrderedDict[str, _Item] = OrderedDict()
        self._added, self._gone = Flag(), Flag()
        self._writer: int | None = None  # the thread that writes
        self._stopping = False

    def add(self, key: ModuleKey, state: KVState, stores: Sequence[ModuleStore]) -> None:
        """Have the state written to the stores, soon; waits while the queue is full."""
        while True:
            self._gone.clear()
            with self._lock:
                nbytes = sum(item.state.nbytes for item in self._items.values())
                if not self._items or nbytes + state.nbytes <= self._queue_bytes:
                    waiting = self._items.get(key.digest)
                    earlier = () if waiting is None else waiting.stores
                    targets = tuple(dict.fromkeys((*earlier, *stores)))
                    self._items[key.digest] = _Item(key, state, targets)
                    break
            self._start()
            self._gone.wait(_LOOK_S)
        self._start()

    def find(self, key: ModuleKey) -> KVState | None:
        """Return the state if it waits to be written and is of the key's tokens."""
        item = self._items.get(key.digest)
        return item.state if item is not None and item.state.token_ids == key.token_ids else None

    def discard(self, key: ModuleKey) -> None:
        """Don't write it; if it is being written, wait until it is."""
        while True:
            with self._lock:
                item = self._items.get(key.digest)
                if item is None or self._first() is not item:
                    self._items.pop(key.digest, None)
                    break
            self._wait_until_gone(item)
        self._gone.set()

    def flush(self) -> None:
        """Wait until everything that waits now is written."""
        with self._lock:
            items = tuple(self._items.values())
        for item in items:
            self._wait_until_gone(item)

    def close(self) -> None:
        """Write what waits and stop the thread; adding starts it again."""
        if self._writer == threading.get_ident():
            self._stopping = True  # collected as garbage by the thread itself
            return
        self.flush()
        self._stopping = True
        self._added.set()

    def _first(self) -> _Item | None:
        """Return the item that is being written, or is to be next."""
        return next(iter(self._items.values()), None)

    def _wait_until_gone(self, item: _Item) -> None:
        while self._items.get(item.key.digest) is item:
            self._gone.clear()
            self._start()
            self._gone.wait(_LOOK_S)

    def _start(self) -> None:
        """Start the thread if it does not run: at first, and after `close`."""
        self._stopping = False
        if self._writer is None:
            # `threading.Thread` waits for the new thread with an `Event`, which interrupts may
            # break.
            _thread.start_new_thread(self._run, ())
        self._added.set()

    def _run(self) -> None:
        with self._lock:
            if self._writer is not None:
                return
            self._writer = threading.get_ident()
        while True:
            self._added.clear()
            with self._lock:
                item = self._first()
                if item is None and self._stopping:
                    self._writer = None
                    return
            if item is None:
                self._added.wait()
                continue
            _write(item)
            with self._lock:
                if self._items.get(item.key.digest) is item:
                    del self._items[item.key.digest]
            self._gone.set()


def _write(item: _Item) -> None:
    for store in item.stores:
        try:
            store.put(item.key, item.state)
        except Exception:  # a store of the caller's own; the thread has to live on
            logger.exception("a state was not written to %s", type(store).__name__)
