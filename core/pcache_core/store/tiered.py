"""Stores in a row: fast and small first, slow and large last."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace

from pcache_core.errors import BudgetError, OptionError
from pcache_core.key import ModuleKey
from pcache_core.kv import KVState
from pcache_core.store.base import Hit, ModuleStore, StoreStats, get_many
from pcache_core.store.counters import Counters
from pcache_core.store.write_behind import WriteBehind

DEFAULT_QUEUE_BYTES = 512 * 2**20


class TieredStore:
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
        self.tiers = _checked(tiers)
        if isinstance(queue_bytes, bool) or not isinstance(queue_bytes, int) or queue_bytes < 0:
            raise BudgetError(f"queue_bytes={queue_bytes!r} must be a number of bytes, 0 or more")
        self._writer = WriteBehind(queue_bytes)
        self._counters = Counters("memory", None)
        weakref.finalize(self, self._writer.close)

    def get(self, key: ModuleKey) -> Hit | None:
        """The state from the first tier that has it."""
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[ModuleKey]) -> list[Hit | None]:
        """What `get` returns for each key; each tier is asked once, for what is still missing."""
        found: dict[str, Hit] = {}
        for index, tier in enumerate(self.tiers):
            if index == 1:
                found |= self._waiting([key for key in keys if key.digest not in found])
            missing = list({k.digest: k for k in keys if k.digest not in found}.values())
            if not missing:
                break
            for key, hit in zip(missing, get_many(tier, missing), strict=True):
                if hit is not None:
                    found[key.digest] = self._promoted(key, hit, index)
        for key in keys:
            if key.digest not in found:
                self._counters.missed()
        return [found.get(key.digest) for key in keys]

    def put(self, key: ModuleKey, state: KVState) -> bool:
        """Keep the state in every tier; whether the first did, or the others will be asked to."""
        kept = self.tiers[0].put(key, state)
        if self.tiers[1:]:
            self._writer.add(key, state, self.tiers[1:])
        return kept or len(self.tiers) > 1

    def contains(self, key: ModuleKey) -> bool:
        """Whether a tier has it, or will."""
        if self.tiers[0].contains(key) or self._writer.find(key) is not None:
            return True
        return any(tier.contains(key) for tier in self.tiers[1:])

    def delete(self, key: ModuleKey) -> None:
        """Forget the state in every tier."""
        self._writer.discard(key)
        for tier in self.tiers:
            tier.delete(key)

    def stats(self) -> StoreStats:
        """All tiers together, each one's own in `tiers`.

        hits, evictions, damaged, failures, load_ms: summed. misses: of this store, a look-up that
        no tier could serve. states: of the tier that has most. nbytes: of all, copies included.
        budget_bytes: the largest, what a single state may take.
        """
        tiers = tuple(tier.stats() for tier in self.tiers)
        budgets = [tier.budget_bytes for tier in tiers]
        return replace(
            self._counters.stats(None, None),
            tier=tiers[0].tier,
            states=max((tier.states for tier in tiers if tier.states is not None), default=None),
            nbytes=sum(tier.nbytes or 0 for tier in tiers),
            budget_bytes=None if None in budgets else max(b for b in budgets if b is not None),
            hits=sum(tier.hits for tier in tiers),
            evictions=sum(tier.evictions for tier in tiers),
            damaged=sum(tier.damaged for tier in tiers),
            failures=sum(tier.failures for tier in tiers),
            load_ms=sum(tier.load_ms for tier in tiers),
            tiers=tiers,
        )

    def flush(self) -> None:
        """Wait until every tier has what was put so far."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and let the writing thread go; the store can be used again."""
        self._writer.close()

    def _waiting(self, keys: Sequence[ModuleKey]) -> dict[str, Hit]:
        """States that left the first tier and wait to be written to the others."""
        found = {}
        for key in keys:
            state = self._writer.find(key)
            if state is not None:
                self.tiers[0].put(key, state)
                found[key.digest] = Hit(state, "memory")
        return found

    def _promoted(self, key: ModuleKey, hit: Hit, index: int) -> Hit:
        """Bring a state to the tiers before `index`.

        A state that is mapped from a file is copied first: what memory keeps must not change, or
        end, with the file.
        """
        if index == 0:
            return hit
        state = _copied(hit.state) if hit.tier == "disk" else hit.state
        self.tiers[0].put(key, state)
        if self.tiers[1:index]:
            self._writer.add(key, state, self.tiers[1:index])
        return Hit(state, hit.tier)


def _copied(state: KVState) -> KVState:
    return replace(
        state,
        keys=tuple(tensor.clone() for tensor in state.keys),
        values=tuple(tensor.clone() for tensor in state.values),
    )


def _checked(tiers: Sequence[ModuleStore]) -> tuple[ModuleStore, ...]:
    if not isinstance(tiers, Sequence) or not tiers:
        raise OptionError(f"tiers must be a list of stores, got {tiers!r}")
    for tier in tiers:
        if not isinstance(tier, ModuleStore):
            raise OptionError(f"a tier must be a ModuleStore, got {type(tier).__name__}")
    return tuple(tiers)
