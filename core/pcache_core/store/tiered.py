"""Stores in a row: fast and small first, slow and large last."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from pcache_core.errors import BudgetError, OptionError, StateMismatchError
from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import Block, KVState, StateSource
from pcache_core.report import StoreStats
from pcache_core.store.base import ModuleStore, Opened, OpeningReads, open_many
from pcache_core.store.counters import Counters
from pcache_core.store.write_behind import WriteBehind

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
