"""What the engine asks of a store, and what every store counts."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

from pcache_core.errors import StateMismatchError
from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import KVState, StateSource
from pcache_core.report import StoreStats, Tier
from pcache_core.threads import fork_safe

T = TypeVar("T")


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
        """Return whether `get` would probably find it. Counts neither as a hit nor as a use."""

    def delete(self, key: ModuleKey) -> None:
        """Forget the state if it is there."""

    def stats(self) -> StoreStats:
        """Counts so far."""


@runtime_checkable
class BatchStore(ModuleStore, Protocol):
    """A store that finds several states faster together than one by one."""

    def get_many(self, keys: Sequence[ModuleKey]) -> list[Hit | None]:
        """Return what `get` would return for each key, in order."""


@runtime_checkable
class LastingStore(ModuleStore, Protocol):
    """A store that outlives the process: a folder, a server."""

    def check(self) -> None:
        """Try to write something small.

        The other methods never raise for a store that does not work, so that requests go on
        without it; this tells a program at its start.

        Raises: StoreError: nothing can be kept there now, and why.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A state that was found and is read when it is used.

    nbytes: as kept. settle: called when it has been read or turned out to be damaged, with the
        milliseconds that reading took: the store counts it, keeps it nearer or drops it.
    """

    rows: StateSource
    tier: Tier
    nbytes: int
    settle: Callable[[float, StateMismatchError | None], None]

    def read(self, use: Callable[[StateSource], T]) -> T | None:
        """Let `use` read the state, once and whole; None if it was damaged, and is dropped."""
        started = time.perf_counter()
        result, error = None, None
        try:
            result = use(self.rows)
        except StateMismatchError as mismatch:
            error = mismatch
        self.settle(ms_since(started), error)
        return result

    def whole(self) -> KVState | None:
        """Read it into memory; None if it was damaged, and is dropped."""
        return self.read(lambda rows: rows.whole())


@runtime_checkable
class OpeningStore(ModuleStore, Protocol):
    """A store whose states can be read into buffers without a copy in between."""

    def open_many(self, keys: Sequence[ModuleKey]) -> list[Opened | None]:
        """For each key a state that is there, in order.

        keys: each once. Slow reads begin for all of them before this returns.
        """


class OpeningReads(ABC):
    """Reads at once what a store opens."""

    def get(self, key: ModuleKey) -> Hit | None:
        """Return the state if it is there and whole; it counts as used."""
        return _hit(self.open_many([key])[0])

    def get_many(self, keys: Sequence[ModuleKey]) -> list[Hit | None]:
        """Return what `get` does for each key; the store is asked for all of them at once."""
        unique = list(dict.fromkeys(keys))
        opened = dict(zip(unique, self.open_many(unique), strict=True))
        return [_hit(opened[key]) for key in keys]

    @abstractmethod
    def open_many(self, keys: Sequence[ModuleKey]) -> list[Opened | None]:
        """Open states, see `OpeningStore`."""


def open_many(store: ModuleStore, keys: Sequence[ModuleKey]) -> list[Opened | None]:
    """Open several states together; those of a store that can't are read by this."""
    if isinstance(store, OpeningStore):
        return store.open_many(keys)

    def opened(key: ModuleKey, hit: Hit) -> Opened:
        def settle(load_ms: float, error: StateMismatchError | None) -> None:
            if error is not None:
                store.delete(key)

        return Opened(hit.state, hit.tier, hit.state.nbytes, settle)

    hits = zip(keys, get_many(store, keys), strict=True)
    return [None if hit is None else opened(key, hit) for key, hit in hits]


def _hit(opened: Opened | None) -> Hit | None:
    state = None if opened is None else opened.whole()
    return None if opened is None or state is None else Hit(state, opened.tier)


def ms_since(started: float) -> float:
    """Return the milliseconds since `started`, by `time.perf_counter`."""
    return (time.perf_counter() - started) * 1000


def get_many(store: ModuleStore, keys: Sequence[ModuleKey]) -> list[Hit | None]:
    """Look several keys up, together where the store can."""
    if isinstance(store, BatchStore):
        return store.get_many(keys)
    return [store.get(key) for key in keys]


logger = logging.getLogger(__name__)


class Counters:
    """Counts of one store. Thread-safe."""

    def __init__(self, tier: Tier, budget_bytes: int | None) -> None:
        self._lock = fork_safe(threading.Lock())
        self._counted = StoreStats(tier, None, None, budget_bytes, 0, 0, 0)

    def add(self, **more: float) -> None:
        """Count something. more: by the names of `StoreStats`."""
        with self._lock:
            sums: dict[str, Any] = {n: getattr(self._counted, n) + more[n] for n in more}
            self._counted = replace(self._counted, **sums)

    def stats(self, states: int | None, nbytes: int | None) -> StoreStats:
        """Return everything counted so far, beside what the store holds now."""
        with self._lock:
            return replace(self._counted, states=states, nbytes=nbytes)


class Outage:
    """Says once that a store stopped working, and once that it works again. Thread-safe.

    what: the store and what it was doing, for the message.
    retry_s: after a failure, `is_over` is False for so long: a dead server costs one time-out in
        each such while, not one a request.
    """

    def __init__(self, what: str, counters: Counters, *, retry_s: float = 0.0) -> None:
        self._what = what
        self._counters = counters
        self._retry_s = retry_s
        self._retry_at = 0.0
        self._is_out = False
        self._lock = fork_safe(threading.Lock())

    @property
    def is_over(self) -> bool:
        """Whether it is time to try (again)."""
        return not self._is_out or time.monotonic() >= self._retry_at

    def failed(self, error: BaseException) -> None:
        """Note a failure; the first since the store last worked is a warning."""
        self._counters.add(failures=1)
        with self._lock:
            self._retry_at = time.monotonic() + self._retry_s
            is_new, self._is_out = not self._is_out, True
        if is_new:
            logger.warning(
                "%s failed (%s: %s); requests go on without it, and this is said once until it "
                "works again",
                self._what,
                type(error).__name__,
                error,
            )

    def worked(self) -> None:
        """Note a success; the first after a failure is reported."""
        if not self._is_out:
            return
        with self._lock:
            was_out, self._is_out = self._is_out, False
        if was_out:
            logger.info("%s works again", self._what)
