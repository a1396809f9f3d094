"""Whether a call that is given up lets go of the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from pcache_core import PromptCacheEngine


class Watched(PromptCacheEngine):
    """An engine that counts the streams that are open: each holds a slot."""

    open_streams = 0

    def stream(self, *args: Any, **options: Any) -> Any:
        inner = super().stream(*args, **options)

        def counted() -> Iterator[Any]:
            self.open_streams += 1
            try:
                yield from inner
            finally:
                inner.close()
                self.open_streams -= 1

        return counted()


async def eventually(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_true():
            await asyncio.sleep(0.01)
