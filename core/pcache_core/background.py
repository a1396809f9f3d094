"""Streams that are made in threads of their own and read in an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

from pcache_core.errors import RequestCancelledError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class _End(Generic[T]):
    """What a stream ended with."""

    error: BaseException | None


class BackgroundStreams:
    """Runs up to `max_running` streams at once; others wait in the order they came.

    A stream is made whether or not its reader keeps up. One that is given up ends with the forward
    it is in.

    cancelled_by: see `CausalLM.cancelled_by`.
    """

    def __init__(
        self,
        max_running: int,
        cancelled_by: Callable[[Callable[[], bool]], AbstractContextManager[None]],
    ) -> None:
        self._threads = ThreadPoolExecutor(max_running, thread_name_prefix="pcache")
        self._cancelled_by = cancelled_by

    async def read(self, start: Callable[[], Generator[T, None, None]]) -> AsyncGenerator[T, None]:
        """The items of the stream that `start` makes; raises what it raises."""
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[T | _End[T]] = asyncio.Queue()
        given_up = threading.Event()

        def deliver(item: T | _End[T]) -> None:
            try:
                loop.call_soon_threadsafe(items.put_nowait, item)
            except RuntimeError:  # the loop is closed
                given_up.set()

        work = self._threads.submit(self._make, start, deliver, given_up)
        try:
            while not isinstance(item := await items.get(), _End):
                yield item
            if item.error is not None:
                raise item.error
        finally:
            given_up.set()
            work.cancel()

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
