"""An engine's history in numbers."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

from pcache_core.report import Report, StoreStats
from pcache_core.threads import fork_safe

_KEPT_REPORTS = 256


@dataclass(frozen=True, slots=True)
class EngineStats(StoreStats):
    """What the store holds and did, and what the engine did since it was made.

    requests: that were finished. prompt_tokens: of all of them, the sum of
    cached_tokens: served from a prefix or a state, and so saved from being computed,
    computed_tokens: that ran through the model as part of a prompt, and those that were encoded for
        it.
    repaired_tokens: reused ones that were computed again all the same.
    generated_tokens: of answers.
    encoded_tokens, encode_ms: encoding of states, for requests and ahead of them.
    prefill_ms, repair_ms: forwards of the requests before their first token.
    running, waiting: requests that are at work, and those that wait for their turn, right now.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    repaired_tokens: int = 0
    generated_tokens: int = 0
    encoded_tokens: int = 0
    encode_ms: float = 0.0
    prefill_ms: float = 0.0
    repair_ms: float = 0.0
    running: int = 0
    waiting: int = 0

    @staticmethod
    def of(store: StoreStats, reports: Reports, **counts: float) -> EngineStats:
        """Make it from what each part counted."""
        own: dict[str, Any] = {name: getattr(store, name) for name in StoreStats.__slots__}
        return EngineStats(**own | reports.totals() | counts)


_SUMMED = (
    "prompt_tokens", "cached_tokens", "computed_tokens", "repaired_tokens", "generated_tokens",
    "prefill_ms", "repair_ms",
)  # fmt: skip


class Reports(deque[Report]):
    """The last 256 reports, and sums over all there ever were. Thread-safe."""

    def __init__(self) -> None:
        super().__init__(maxlen=_KEPT_REPORTS)
        self._lock = fork_safe(threading.Lock())
        self._totals: dict[str, float] = dict.fromkeys(("requests", *_SUMMED), 0)

    def append(self, report: Report) -> None:
        """Add a finished request."""
        with self._lock:
            super().append(report)
            self._totals["requests"] += 1
            for name in _SUMMED:
                self._totals[name] += getattr(report, name)

    def __getitem__(self, index: Any) -> Any:
        """Return one report, or a list for a slice such as `[-3:]`."""
        with self._lock:
            return list(self)[index] if isinstance(index, slice) else super().__getitem__(index)

    def totals(self) -> dict[str, float]:
        """Return the sums by the names of `EngineStats`."""
        with self._lock:
            return dict(self._totals)
