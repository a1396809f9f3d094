"""Streams that are made in threads of their own and read in an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

from pcache_core.deadline import too_late
from pcache_core.errors import RequestCancelledError
from pcache_core.gate import Gate

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class _End(Generic[T]):
    """What a stream ended with."""

    error: BaseException | None


class BackgroundStreams:
    """Runs as many streams at once as the gate lets work; others wait in the order they came.

    A stream is made whether or not its reader keeps up. One that is given up ends with the forward
    it is in.

    gate: in which a stream has its place from the beginning. cancelled_by: see
        `CausalLM.cancelled_by`.
    """

    def __init__(
        self,
        gate: Gate,
        cancelled_by: Callable[[Callable[[], bool]], AbstractContextManager[None]],
    ) -> None:
        self._gate = gate
        self._threads = ThreadPoolExecutor(gate.max_running, thread_name_prefix="pcache")
        self._cancelled_by = cancelled_by

    async def read(
        self, start: Callable[[], Generator[T, None, None]], timeout_s: float | None = None
    ) -> AsyncGenerator[T, None]:
        """The items of the stream that `start` makes; raises what it raises.

        timeout_s: seconds within which the stream has to be begun; once it is, its own matter.
        Raises: OverloadedError: too many requests wait. DeadlineExceededError: it was not begun.
        """
        place = self._gate.queue(time.perf_counter())
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[T | _End[T]] = asyncio.Queue()
        given_up = threading.Event()

        def deliver(item: T | _End[T]) -> None:
            try:
                loop.call_soon_threadsafe(items.put_nowait, item)
            except RuntimeError:  # the loop is closed
                given_up.set()

        def make() -> None:
            try:
                with self._gate.using(place):
                    self._make(start, deliver, given_up)
            finally:
                place.leave()

        work = self._threads.submit(make)

        def expire() -> None:
            if work.cancel():
                place.leave()
                items.put_nowait(_End(too_late(timeout_s)))

        timer = None if timeout_s is None else loop.call_later(timeout_s, expire)
        try:
            while not isinstance(item := await items.get(), _End):
                yield item
            if item.error is not None:
                raise item.error
        finally:
            given_up.set()
            if timer is not None:
                timer.cancel()
            if work.cancel():
                place.leave()

    def _make(
        self,
        start: Callable[[], Generator[T, None, None]],
        deliver: Callable[[T | _End[T]], None],
        given_up: threading.Event,
    ) -> None:
        error: BaseException | None = None
        try:
            with self._cancelled_by(given_up.is_set):
                stream = start()
                try:
                    for item in stream:
                        deliver(item)
                        if given_up.is_set():
                            break
                finally:
                    stream.close()
        except RequestCancelledError:
            return
        except BaseException as raised:
            error = raised
        deliver(_End(error))
