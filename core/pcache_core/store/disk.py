"""States in a folder, one file each: they survive the process, and processes share them."""

from __future__ import annotations

import os
import stat
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from pcache_core.errors import OptionError, StateMismatchError, StoreError
from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import KVState
from pcache_core.params import StorageDtype
from pcache_core.report import StoreStats
from pcache_core.store import serde
from pcache_core.store.base import Opened, Outage, ms_since
from pcache_core.store.folder import StateFolder, open_file
from pcache_core.store.memory import check_budget

DEFAULT_DISK_BUDGET_BYTES = 32 * 2**30
_MOST_OPEN = 64  # states that are asked for together


class DiskStore(serde.SealedStore):
    """A byte-bounded store in a folder, least recently used out first.

    path: the folder, made with mode 0700 if it is not there; files have mode 0600. Whoever can read
        them can read the texts: a state is as secret as what it was made from.
    budget_bytes: of the files together, also when several processes share the folder; None for no
        limit but the disk's.
    storage_dtype: how numbers are kept. `int8` takes a quarter of fp32's room and loses a little;
        states come back in the model's dtype. Stores of different `storage_dtype` may share a
        folder, and do not see each other's states.
    hmac_key: see `Seal`.

    Every file is read into memory of the reader's own and checked there, from the first byte to
    the last; one that is damaged, or another model's, is removed and counts as a miss. Where the
    folder can't be read or written, look-ups miss and `put` keeps nothing, with one warning until
    it works again. What stands in the folder and is not a state is left alone.

    Raises: OptionError: a path that is no path; unknown storage dtype; a bad key. BudgetError: the
        budget is not positive. StoreError: the folder can't be made.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        budget_bytes: int | None = DEFAULT_DISK_BUDGET_BYTES,
        *,
        storage_dtype: StorageDtype = "auto",
        hmac_key: bytes | None = None,
    ) -> None:
        self.path: Path = _checked_path(path)
        self._budget_bytes = None if budget_bytes is None else check_budget(budget_bytes)
        super().__init__("disk", self._budget_bytes, storage_dtype, hmac_key)
        self._folder = StateFolder(self.path)
        self._reading = Outage(f"reading states in {self.path}", self._counters)
        self._writing = Outage(f"writing states to {self.path}", self._counters)
        try:
            self._folder.create()
        except OSError as error:
            raise StoreError(
                f"no folder for states at {str(self.path)!r}: {error.strerror or error}; "
                "give a folder that exists or can be made"
            ) from error

    def open_many(self, keys: Sequence[ModuleKey]) -> list[Opened | None]:
        """Find the states that are there; their numbers are read when they are used.

        The kernel is told to read all of them before the first is looked at: a disk serves them
        together, and goes on while the first are copied into buffers.
        """
        found: list[Opened | None] = []
        for start in range(0, len(keys), _MOST_OPEN):
            some = keys[start : start + _MOST_OPEN]
            started = time.perf_counter()
            for key in some:
                _read_ahead(self._path(key))
            told_ms = ms_since(started) / len(some)
            found += [self._open(key, told_ms) for key in some]
        return found

    def _open(self, key: ModuleKey, told_ms: float) -> Opened | None:
        started = time.perf_counter()
        try:
            return self._opened(
                key, partial(open_file, self._path(key)), told_ms + ms_since(started)
            )
        except OSError as error:
            self._failed(error)
            return None

    def _used(self, key: ModuleKey) -> None:
        self._folder.used(self._path(key))
        self._reading.worked()

    def _drop(self, key: ModuleKey, error: StateMismatchError) -> None:
        if isinstance(error.__cause__, OSError):
            self._failed(error.__cause__)
        else:
            super()._drop(key, error)

    def _failed(self, error: OSError) -> None:
        """Count a miss, and a failure where something is there."""
        self._counters.add(misses=1)
        if not isinstance(error, FileNotFoundError):
            self._reading.failed(error)

    def put(self, key: ModuleKey, state: KVState) -> bool:
        """Write the state and make room for it; False if it can't be kept.

        A state under the same key is replaced. The disk has it when this returns.
        """
        buffers = self._encoded(key, state)
        nbytes = sum(buffer.nbytes for buffer in buffers)
        if not buffers or (self._budget_bytes is not None and nbytes > self._budget_bytes):
            return False
        try:
            self._folder.write(self._name(key), buffers)
            if self._budget_bytes is not None:
                self._counters.add(evictions=self._folder.evict(self._budget_bytes))
        except OSError as error:
            self._writing.failed(error)
            return False
        self._writing.worked()
        return True

    def contains(self, key: ModuleKey) -> bool:
        """Return whether a file of this name is there; what is in it, only `get` finds out."""
        try:
            status = os.lstat(self._path(key))
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size > 0

    def delete(self, key: ModuleKey) -> None:
        """Remove the state's file if it is there."""
        try:
            self._folder.remove(self._path(key))
        except OSError as error:
            self._writing.failed(error)

    def check(self) -> None:
        """Raises: StoreError: no file can be written to the folder, and why."""
        try:
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise StoreError(
                f"the folder {str(self.path)!r} can't be written: {error.strerror or error}; "
                "give a folder of your own"
            ) from error

    def stats(self) -> StoreStats:
        """Counts so far, and what the folder holds now, other processes' states included."""
        try:
            return self._counters.stats(*self._folder.usage())
        except OSError as error:
            self._reading.failed(error)
            return self._counters.stats(0, 0)

    def _path(self, key: ModuleKey) -> Path:
        return self._folder.path(self._name(key))


def _checked_path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise OptionError(f"path must name a folder, got {path!r}")
    return Path(os.path.abspath(os.path.expanduser(os.fspath(path))))


def _read_ahead(path: Path) -> None:
    """Ask the kernel to read a file that is not in memory; what is wrong with it shows later."""
    with suppress(OSError, StateMismatchError), open_file(path) as file:
        descriptor = file.fileno()
        if not _is_cached(descriptor, os.fstat(descriptor).st_size):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)


def _is_cached(descriptor: int, nbytes: int) -> bool:
    """Say whether a file's beginning, middle and end are in memory; True where nobody can tell.

    A hint: asking for pages that are there already takes as long as finding out the hard way.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    byte = [bytearray(1)]
    try:
        return all(
            os.preadv(descriptor, byte, offset, os.RWF_NOWAIT)
            for offset in (0, nbytes // 2, max(nbytes - 1, 0))
        )
    except BlockingIOError:
        return False
    except OSError:  # a file system that can't say
        return True
