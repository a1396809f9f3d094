"""How many requests work at the same time, and how many may wait for that.

Each request at work holds keys and values, so more of them need more memory, and beyond some number
nobody's answer comes sooner. The others wait, in the order they came; when too many do, the next is
refused at once, which tells a caller more than an answer that comes too late.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from pcache_core.errors import OverloadedError

_LOOK_S = 0.05  # how often a request that waits looks whether it still has to


class _Thread(threading.local):
    """The place that was taken for what a thread is about to do."""

    place: Place | None = None


class Gate:
    """Lets `max_running` requests work, and `max_waiting` more wait. Thread-safe."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self._running = 0
        self._queued = 0
        self._line: deque[Place] = deque()
        self._moved = threading.Condition()
        self._thread = _Thread()

    @property
    def running(self) -> int:
        """Requests at work."""
        return self._running

    @property
    def waiting(self) -> int:
        """Requests that are queued."""
        return self._queued

    @contextmanager
    def using(self, place: Place) -> Iterator[None]:
        """Inside, `queue` gives this thread a place that was taken for it before."""
        self._thread.place = place
        try:
            yield
        finally:
            self._thread.place = None

    def queue(self, asked_at: float) -> Place:
        """A place in the queue. Raises: OverloadedError: the queue is full."""
        held, self._thread.place = self._thread.place, None
        if held is not None:
            return held
        with self._moved:
            if self._running + self._queued >= self.max_running + self.max_waiting:
                raise OverloadedError(
                    f"{self._running} requests are at work and {self._queued} wait, the limits are "
                    f"{self.max_running} and {self.max_waiting}; try again later, or raise "
                    "max_waiting of the engine"
                )
            self._queued += 1
            return Place(self, asked_at)


class Place:
    """One request's: first in the queue, then at work. Left once, whatever happened.

    asked_at: when the request came, by `time.perf_counter`.
    """

    def __init__(self, gate: Gate, asked_at: float) -> None:
        self.asked_at = asked_at
        self._gate = gate
        self._state: Literal["queued", "working", "paused", "left"] = "queued"

    def start(self, check: Callable[[], None]) -> None:
        """Wait until it is this request's turn to work.

        check: is asked again and again; ends the waiting by raising.
        """
        gate = self._gate
        with gate._moved:
            gate._line.append(self)
            try:
                check()
                while gate._line[0] is not self or gate._running >= gate.max_running:
                    gate._moved.wait(_LOOK_S)
                    check()
                self._become("working")
            finally:
                gate._line.remove(self)
                gate._moved.notify_all()

    def pause(self) -> None:
        """Let others work while nobody asks for this request's next piece."""
        with self._gate._moved:
            self._become("paused")

    def resume(self) -> None:
        """Go on, at once: what has begun is never kept waiting, so nobody waits for ever."""
        with self._gate._moved:
            self._become("working")

    def leave(self) -> None:
        """Be done, or give up."""
        with self._gate._moved:
            self._become("left")

    def _become(self, state: Literal["working", "paused", "left"]) -> None:
        gate = self._gate
        gate._queued -= self._state == "queued"
        gate._running += (state == "working") - (self._state == "working")
        self._state = state
        if gate._line:
            gate._moved.notify_all()
