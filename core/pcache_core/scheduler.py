"""Turns: how many requests work at the same time, how many wait for that, and for how long.

Each request at work holds keys and values, so more of them need more memory, and beyond some number
nobody's answer comes sooner. The others wait, in the order they came; when too many do, the next is
refused at once, which tells a caller more than an answer that comes too late.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar
from weakref import WeakSet

import torch

from pcache_core.errors import DeadlineExceededError, OverloadedError, RequestCancelledError
from pcache_core.lm import CausalLM
from pcache_core.threads import Flag, renew_in_child

T = TypeVar("T")

_LOOK_S = 0.05  # how often a request that waits looks whether it still has to


@dataclass(slots=True, eq=False, weakref_slot=True)
class Place:
    """One request's: first in the queue, then at work.

    asked_at: when the request came, by `time.perf_counter`.
    state: to set it to `left` is enough to leave, whatever comes after that.
    turn: wakes the one who waits to start.
    """

    asked_at: float
    state: Literal["queued", "working", "paused", "left"] = "queued"
    turn: Flag = field(default_factory=Flag)


class _TakenPlace(threading.local):
    """The place that was taken for what a thread is about to do."""

    place: Place | None = None


class Gate:
    """Lets `max_running` requests work, and `max_waiting` more wait. Thread-safe."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self._thread = _TakenPlace()
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """Begin anew: in a forked child, nobody is at work or waits."""
        self._lock = threading.RLock()
        # What a place's state says is true. Weak: one that an interrupt took from its request is
        # gone with it.
        self._queued: WeakSet[Place] = WeakSet()
        self._begun: WeakSet[Place] = WeakSet()
        self._line: list[Place] = []

    @property
    def running(self) -> int:
        """Requests at work."""
        with self._lock:
            return sum(place.state == "working" for place in self._begun)

    @property
    def waiting(self) -> int:
        """Requests that are queued."""
        with self._lock:
            return sum(place.state == "queued" for place in self._queued)

    @contextmanager
    def using(self, place: Place) -> Iterator[None]:
        """Inside, `queue` gives this thread a place that was taken for it before."""
        self._thread.place = place
        try:
            yield
        finally:
            self._thread.place = None

    def queue(self, asked_at: float) -> Place:
        """Return a place in the queue. Raises: OverloadedError: the queue is full."""
        held, self._thread.place = self._thread.place, None
        if held is not None:
            return held
        limit = self.max_running + self.max_waiting
        place = Place(asked_at)
        with self._lock:
            if len(self._begun) + len(self._queued) >= limit:
                running, waiting = self.running, self.waiting
                if running + waiting >= limit:
                    raise OverloadedError(
                        f"{running} requests are at work and {waiting} wait, the limits are "
                        f"{self.max_running} and {self.max_waiting}; try again later, or raise "
                        "max_waiting of the engine"
                    )
            self._queued.add(place)
        return place

    def start(self, place: Place, check: Callable[[], None]) -> None:
        """Wait until it is a request's turn to work, after all that began to wait before.

        check: is asked again and again; ends the waiting by raising.
        """
        check()
        with self._lock:
            self._line.append(place)
        while True:
            place.turn.clear()
            if self._admit(place):
                break
            place.turn.wait(_LOOK_S)
            check()
        self._wake()

    def pause(self, place: Place) -> None:
        """Let others work while nobody asks for a request's next piece.

        It goes on at once when its state is `working` again: what has begun is never kept waiting,
        so nobody waits for ever.
        """
        place.state = "paused"
        self._wake()

    def leave(self, place: Place) -> None:
        """Be done with a request, or give it up."""
        place.state = "left"
        with self._lock:
            self._begun.discard(place)
            self._queued.discard(place)
        self._wake()

    def _admit(self, place: Place) -> bool:
        """Let a place work if it is the first in the line and there is room."""
        with self._lock:
            self._line = [other for other in self._line if other.state == "queued"]
            if self._line[0] is not place or self.running >= self.max_running:
                return False
            self._begun.add(place)
            place.state = "working"
            self._queued.discard(place)
            del self._line[0]
        return True

    def _wake(self) -> None:
        """Tell the first in the line that there may be room."""
        for place in self._line[:1]:
            place.turn.set()


def too_late(timeout_s: float | None) -> DeadlineExceededError:
    """Return what a request ends with whose time has passed."""
    return DeadlineExceededError(
        f"the answer was not done within timeout_s={timeout_s}; allow more time, ask for fewer "
        "max_tokens, or run fewer requests at once"
    )


@dataclass(frozen=True, slots=True, eq=False)
class _End(Generic[T]):
    """What a stream ended with."""

    error: BaseException | None


class Scheduler:
    """Runs requests in turn: in the caller's thread, or for an event loop in threads of its own."""

    def __init__(self, lm: CausalLM, max_running: int, max_waiting: int) -> None:
        self._lm = lm
        self.gate = Gate(max_running, max_waiting)
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """Begin anew: in a forked child, the threads of the pool don't exist."""
        self._threads = ThreadPoolExecutor(self.gate.max_running, thread_name_prefix="pcache")

    def run(
        self,
        answer: Callable[[float], Generator[T, None, None]],
        *,
        spent_s: float,
        timeout_s: float | None,
    ) -> Generator[T, None, None]:
        """Yield what `answer` makes when its turn has come; while nobody asks for more, it pauses.

        answer: is told when the request came, which may have been before this was called.
        spent_s: seconds that it took before its first item was asked for.
        Raises: OverloadedError: too many requests wait. DeadlineExceededError: the time has passed.
        """
        place = self.gate.queue(time.perf_counter() - spent_s)
        items = answer(place.asked_at)
        try:
            try:
                with self._in_time(place, timeout_s):
                    self.gate.start(place, self._lm.check_cancelled)
                while True:
                    # What a request made is used by later ones, in the caller's mode or not.
                    with torch.inference_mode(mode=False), self._in_time(place, timeout_s):
                        item = next(items, None)
                    if item is None:
                        return
                    self.gate.pause(place)
                    yield item
                    place.state = "working"
            finally:
                items.close()
        finally:  # these come first: an interrupt may land in any call
            place.state = "left"
            self.gate.leave(place)

    @contextmanager
    def _in_time(self, place: Place, timeout_s: float | None) -> Iterator[None]:
        """Inside, what waits for the model or for its turn is given up when the time has passed.

        Not when the request has been left: nothing else ends by its deadline.
        Raises: DeadlineExceededError: it has.
        """
        if timeout_s is None:
            yield
            return
        ends = place.asked_at + timeout_s

        def is_passed() -> bool:
            return place.state != "left" and time.perf_counter() >= ends

        try:
            with self._lm.cancelled_by(is_passed):
                yield
        except RequestCancelledError:
            if not is_passed():
                raise
            raise too_late(timeout_s) from None

    async def run_in_thread(
        self, start: Callable[[], Generator[T, None, None]], timeout_s: float | None = None
    ) -> AsyncGenerator[T, None]:
        """Yield the items of the stream that `start` makes; raises what it raises.

        timeout_s: seconds within which the stream has to be begun; once it is, its own matter.
        Raises: OverloadedError: too many requests wait. DeadlineExceededError: it was not begun.
        """
        place = self.gate.queue(time.perf_counter())
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[T | _End[T]] = asyncio.Queue()
        given_up = Flag()

        def deliver(item: T | _End[T]) -> None:
            try:
                loop.call_soon_threadsafe(items.put_nowait, item)
            except RuntimeError:  # the loop is closed
                given_up.set()

        def make() -> None:
            try:
                with self.gate.using(place):
                    self._make(start, deliver, given_up)
            finally:
                self.gate.leave(place)

        work = self._threads.submit(make)

        def expire() -> None:
            if work.cancel():
                self.gate.leave(place)
                items.put_nowait(_End(too_late(timeout_s)))

        timer = None if timeout_s is None else loop.call_later(timeout_s, expire)
        try:
            while not isinstance(item := await items.get(), _End):
                yield item
            if item.error is not None:
                raise item.error
        finally:
            given_up.is_set = True
            if timer is not None:
                timer.cancel()
            if work.cancel():
                self.gate.leave(place)

    def _make(
        self,
        start: Callable[[], Generator[T, None, None]],
        deliver: Callable[[T | _End[T]], None],
        given_up: Flag,
    ) -> None:
        error: BaseException | None = None
        try:
            with self._lm.cancelled_by(lambda: given_up.is_set):
                stream = start()
                try:
                    for item in stream:
                        deliver(item)
                        if given_up.is_set:
                            break
                finally:
                    stream.close()
        except RequestCancelledError:
            return
        except BaseException as raised:
            error = raised
        deliver(_End(error))
