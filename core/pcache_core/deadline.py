"""A request's turn and its time limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pcache_core.errors import DeadlineExceededError, RequestCancelledError
from pcache_core.gate import Gate
from pcache_core.lm import CausalLM

T = TypeVar("T")


def too_late(timeout_s: float | None) -> DeadlineExceededError:
    """What a request ends with whose time has passed."""
    return DeadlineExceededError(
        f"the answer was not done within timeout_s={timeout_s}; allow more time, ask for fewer "
        "max_tokens, or run fewer requests at once"
    )


class Deadline:
    """The moment a request has to be done by.

    timeout_s: None leaves it all the time it needs. asked_at: by `time.perf_counter`.
    """

    def __init__(self, timeout_s: float | None, asked_at: float) -> None:
        self._timeout_s = timeout_s
        self._ends = None if timeout_s is None else asked_at + timeout_s

    @contextmanager
    def over(self, lm: CausalLM) -> Iterator[None]:
        """Inside, what waits for the model or for its turn is given up when the time has passed.

        Raises: DeadlineExceededError: it has.
        """
        if self._ends is None:
            yield
            return
        try:
            with lm.cancelled_by(self._is_passed):
                yield
        except RequestCancelledError:
            if not self._is_passed():
                raise
            raise too_late(self._timeout_s) from None

    def _is_passed(self) -> bool:
        return self._ends is not None and time.perf_counter() >= self._ends


def in_turn(
    gate: Gate,
    lm: CausalLM,
    timeout_s: float | None,
    asked_at: float,
    run: Callable[[float], Generator[T, None, None]],
) -> Generator[T, None, None]:
    """What `run` makes when its turn has come; its turn ends while nobody asks for more.

    run: is told when the request came, which may have been before this was called.
    Raises: OverloadedError: too many requests wait. DeadlineExceededError: the time has passed.
    """
    place = gate.queue(asked_at)
    deadline = Deadline(timeout_s, place.asked_at)
    items = run(place.asked_at)
    try:
        with deadline.over(lm):
            place.start(lm.check_cancelled)
        while True:
            with deadline.over(lm):
                item = next(items, None)
            if item is None:
                return
            place.pause()
            yield item
            place.resume()
    finally:
        items.close()
        place.leave()
