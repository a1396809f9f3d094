"""Stores in a row: fast and small first, slow and large last."""

from __future__ import annotations

import _thread
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from pcache_core.errors import BudgetError, OptionError, StateMismatchError
from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import Block, KVState, StateSource
from pcache_core.report import StoreStats
from pcache_core.store.base import (
    Counters,
    ModuleStore,
    Opened,
    OpeningReads,
    open_many,
)
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

    def keys(self) -> list[ModuleKey]:
        """Return the keys of what waits, or is being written."""
        with self._lock:
            return [item.key for item in self._items.values()]

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


DEFAULT_QUEUE_BYTES = 512 * 2**20
_SUMMED = ("hits", "evictions", "damaged", "failures", "load_ms", "loaded_nbytes")


class TieredStore(OpeningReads):
    """Looks states up in each tier in turn, and brings what it finds to the tiers before it.

    tiers: any stores, such as `[MemoryStore(), DiskStore("states"), RedisStore(url)]`. The first is
        written at once, the others by a thread, in order; what still waits is found as well, and
        written before the interpreter exits. A state is in every tier that has room for it.
    queue_bytes: how much may wait to be written. Beyond it `put` takes as long as the slow tiers.

    Raises: OptionError: no tiers, or one that is no store. BudgetError: `queue_bytes` is negative.
    """

    def __init__(
        self, tiers: Sequence[ModuleStore], *, queue_bytes: int = DEFAULT_QUEUE_BYTES
    ) -> None:
        self.tiers: tuple[ModuleStore, ...] = _checked(tiers)
        if isinstance(queue_bytes, bool) or not isinstance(queue_bytes, int) or queue_bytes < 0:
            raise BudgetError(f"queue_bytes={queue_bytes!r} must be a number of bytes, 0 or more")
        self._writer = WriteBehind(queue_bytes)
        self._counters = Counters("memory", None)
        weakref.finalize(self, self._writer.close)

    def open_many(self, keys: Sequence[ModuleKey]) -> list[Opened | None]:
        """The states of the first tier that has each; what was used is then in the tiers before."""
        found = self._find(keys)
        return [self._promoting(key, *found[key]) if key in found else None for key in keys]

    def _find(self, keys: Sequence[ModuleKey]) -> dict[ModuleKey, _Place]:
        found: dict[ModuleKey, _Place] = {}
        for index, tier in enumerate(self.tiers):
            if index == 1:
                found |= self._waiting([key for key in keys if key not in found])
            missing = [key for key in keys if key not in found]
            if not missing:
                break
            for key, opened in zip(missing, open_many(tier, missing), strict=True):
                if opened is not None:
                    found[key] = (opened, index)
        for key in keys:
            if key not in found:
                self._counters.add(misses=1)
        return found

    def put(self, key: ModuleKey, state: KVState) -> bool:
        """Keep the state in every tier; whether the first did, or the others will be asked to."""
        kept = self.tiers[0].put(key, state)
        if self.tiers[1:]:
            self._writer.add(key, state, self.tiers[1:])
        return kept or len(self.tiers) > 1

    def contains(self, key: ModuleKey) -> bool:
        """Return whether a tier has it, or will."""
        if self.tiers[0].contains(key) or self._writer.find(key) is not None:
            return True
        return any(tier.contains(key) for tier in self.tiers[1:])

    def delete(self, key: ModuleKey) -> None:
        """Forget the state in every tier."""
        self._writer.discard(key)
        for tier in self.tiers:
            tier.delete(key)

    def held_keys(self) -> list[ModuleKey]:
        """Return the keys of states that wait to be written; the first tier may not have them."""
        return self._writer.keys()

    def stats(self) -> StoreStats:
        """Return all tiers together, each one's own in `tiers`.

        hits, evictions, damaged, failures, load_ms, loaded_nbytes: summed. misses: of
        this store, a look-up that no tier could serve. states: of the tier that has most. nbytes:
        of all, copies included. budget_bytes: the largest, what a single state may take.
        """
        tiers = tuple(tier.stats() for tier in self.tiers)
        budgets = [tier.budget_bytes for tier in tiers]
        return replace(
            self._counters.stats(None, None),
            tier=tiers[0].tier,
            states=max((tier.states for tier in tiers if tier.states is not None), default=None),
            nbytes=sum(tier.nbytes or 0 for tier in tiers),
            budget_bytes=None if None in budgets else max(b for b in budgets if b is not None),
            **{name: sum(getattr(tier, name) for tier in tiers) for name in _SUMMED},
            tiers=tiers,
        )

    def flush(self) -> None:
        """Wait until every tier has what was put so far."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and let the writing thread go; the store can be used again."""
        self._writer.close()

    def _waiting(self, keys: Sequence[ModuleKey]) -> dict[ModuleKey, _Place]:
        """States that left the first tier and wait to be written to the others."""
        found = {}
        for key in keys:
            state = self._writer.find(key)
            if state is not None:
                self.tiers[0].put(key, state)
                opened = Opened(state, "memory", state.nbytes, lambda load_ms, error: None)
                found[key] = (opened, 0)
        return found

    def _promoting(self, key: ModuleKey, opened: Opened, index: int) -> Opened:
        """The same, brought to the tiers before `index` when it has been used and is whole."""
        if index == 0:
            return opened
        rows = _ReadOnce(opened.rows)

        def settle(load_ms: float, error: StateMismatchError | None) -> None:
            opened.settle(load_ms, error)
            if error is None and not self.tiers[0].contains(key):
                # Damaged since it was used, a moment ago: the next look-up finds that.
                with suppress(StateMismatchError):
                    state = rows.whole()
                    self.tiers[0].put(key, state)
                    if self.tiers[1:index]:
                        self._writer.add(key, state, self.tiers[1:index])

        return replace(opened, rows=rows, settle=settle)


class _ReadOnce:
    """A state of a slow tier. One reading serves the request and the tiers before."""

    def __init__(self, rows: StateSource) -> None:
        self.stacks, self.token_ids, self.position = rows.stacks, rows.token_ids, rows.position
        self.num_tokens = rows.num_tokens
        self.check = rows.check
        self._rows = rows

    def blocks(self) -> Iterator[Block]:
        """See `StateSource`."""
        return self.whole().blocks()

    def whole(self) -> KVState:
        """See `StateSource`."""
        self._rows = self._rows.whole()
        return self._rows


_Place = tuple[Opened, int]
"""A state and the tier that has it, by index."""


def _checked(tiers: Sequence[ModuleStore]) -> tuple[ModuleStore, ...]:
    if not isinstance(tiers, Sequence) or not tiers:
        raise OptionError(f"tiers must be a list of stores, got {tiers!r}")
    for tier in tiers:
        if not isinstance(tier, ModuleStore):
            raise OptionError(f"a tier must be a ModuleStore, got {type(tier).__name__}")
    return tuple(tiers)
