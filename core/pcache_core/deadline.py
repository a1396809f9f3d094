"""A request's time limit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pcache_core.errors import DeadlineExceededError, RequestCancelledError
from pcache_core.lm import CausalLM


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
