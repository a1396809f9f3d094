"""A store's history in numbers, and its troubles in few words."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from typing import Any

from pcache_core.report import StoreStats, Tier
from pcache_core.threads import fork_safe

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
