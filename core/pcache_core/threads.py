"""What threads wait with, such that an interrupt at any moment leaves nothing locked for ever.

`threading.Condition` and what is made of it (`Event`, `Semaphore`) take and give their lock in
Python code, where Ctrl-C may land in between: the lock then stays taken. Locks themselves are safe
in a `with` statement. The rest follows one rule: what is true is said by one attribute, set first
thing in a `finally`, and those who wait look at it again and again.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

AnyLock = TypeVar("AnyLock", threading.Lock, "threading.RLock")

_LOOK_S = 0.05  # how often a waiting thread looks whether somebody forgot to wake it


class Flag:
    """Something that threads wait for. Setting the attribute `is_set` is enough; `set` is faster.

    is_set: whether it has happened.
    """

    __slots__ = ("_asleep", "is_set")

    def __init__(self, *, is_set: bool = False) -> None:
        self.is_set = is_set
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def set(self) -> None:
        """Let it have happened, and wake who waits."""
        self.is_set = True
        with suppress(RuntimeError):  # nobody has slept since the last time
            self._asleep.release()

    def clear(self) -> None:
        """Let it not have happened."""
        self.is_set = False

    def wait(self, timeout_s: float = float("inf")) -> bool:
        """Wait until it has happened, for so many seconds at most; return whether it has."""
        ends = time.perf_counter() + timeout_s
        while not self.is_set:
            left = min(ends - time.perf_counter(), _LOOK_S)
            if left <= 0:
                return False
            if self._asleep.acquire(timeout=left) and self.is_set:
                with suppress(RuntimeError):
                    self._asleep.release()  # wake the next one
        return True


class Renewable(Protocol):
    """Holds what other threads may be in the middle of."""

    def renew(self) -> None:
        """Forget other threads: in a forked child there are none."""


def renew_in_child(thing: Renewable) -> None:
    """Call `thing.renew()` in every child that is forked as long as it exists."""
    _renewable.add(thing)


def fork_safe(lock: AnyLock) -> AnyLock:
    """Let a lock be free in every forked child, where the thread that held it does not exist.

    What that thread was changing stays as it was at that moment: this is for what may be a little
    off, and for nothing that must be whole.
    """
    _locks.add(lock)
    return lock


_renewable: WeakSet[Renewable] = WeakSet()
_locks: WeakSet[Any] = WeakSet()


def _renew_all() -> None:
    for lock in _locks:
        lock._at_fork_reinit()
    for thing in _renewable:
        thing.renew()


if hasattr(os, "register_at_fork"):  # not on Windows, which doesn't fork
    os.register_at_fork(after_in_child=_renew_all)
