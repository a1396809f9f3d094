"""States in a folder, one file each: they survive the process, and processes share them."""

from __future__ import annotations

import logging
import mmap
import os
import stat
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pcache_core.errors import OptionError, StateMismatchError, StoreError
from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import KVState
from pcache_core.store import serde
from pcache_core.store.base import (
    Hit,
    Opened,
    StoreStats,
    milliseconds_since,
    read,
)
from pcache_core.store.counters import Counters, Outage
from pcache_core.store.folder import Entry, StateFolder, Usage
from pcache_core.store.memory import check_budget
from pcache_core.store.packing import check_storage_dtype, stored_name
from pcache_core.store.record import StorageDtype
from pcache_core.store.seal import Seal

logger = logging.getLogger(__name__)

DEFAULT_DISK_BUDGET_BYTES = 32 * 2**30


class DiskStore:
    """A byte-bounded store in a folder, least recently used out first.

    path: the folder, made with mode 0700 if it is not there; files have mode 0600. Whoever can read
        them can read the texts: a state is as secret as what it was made from.
    budget_bytes: of the files together, also when several processes share the folder; None for no
        limit but the disk's.
    storage_dtype: how numbers are kept. `int8` takes a quarter of fp32's room and loses a little;
        states come back in the model's dtype. Stores of different `storage_dtype` may share a
        folder, and do not see each other's states.
    hmac_key: see `Seal`.

    Every file is checked from the first byte to the last when it is read; one that is damaged,
    or another model's, is removed and counts as a miss. Where the folder can't be read or written,
    look-ups miss and `put` keeps nothing, with one warning until it works again.

    States are memory-mapped: files must never be changed in place, only replaced.

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
        self.storage_dtype = check_storage_dtype(storage_dtype)
        self._budget_bytes = None if budget_bytes is None else check_budget(budget_bytes)
        self._seal = Seal(hmac_key)
        self._folder = StateFolder(self.path)
        self._counters = Counters("disk", self._budget_bytes)
        self._reading = Outage(f"reading states in {self.path}", self._counters)
        self._writing = Outage(f"writing states to {self.path}", self._counters)
        try:
            self._folder.create()
        except OSError as error:
            raise StoreError(
                f"no folder for states at {str(self.path)!r}: {error.strerror or error}; "
                "give a folder that exists or can be made"
            ) from error

    def get(self, key: ModuleKey) -> Hit | None:
        """The state, mapped into memory, if it is there and whole; it becomes the most recent."""
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[ModuleKey]) -> list[Hit | None]:
        """What `get` returns for each key; the disk is asked for all of them at once."""
        found = self.open_many(keys)
        return [read(opened) for opened in found]

    def open_many(self, keys: Sequence[ModuleKey]) -> list[Opened | None]:
        """The states that are there, mapped and not yet read.

        The kernel is told to read all of them before the first is looked at: a disk serves them
        together, and goes on while the first are copied into buffers.
        """
        started = time.perf_counter()
        files = [(key, self._file(key)) for key in keys]
        opening_ms = milliseconds_since(started) / max(len(keys), 1)
        return [file and self._opened(key, *file, opening_ms) for key, file in files]

    def _file(self, key: ModuleKey) -> tuple[Entry, mmap.mmap] | None:
        path = self._folder.path(self._name(key))
        try:
            _check_nbytes(path)
            return _mapped(path)
        except FileNotFoundError:
            self._counters.missed()
        except StateMismatchError as error:
            self._drop(path, error)
        except OSError as error:
            self._reading.failed(error)
            self._counters.missed()
        return None

    def _opened(
        self, key: ModuleKey, entry: Entry, content: mmap.mmap, opening_ms: float
    ) -> Opened | None:
        try:
            raw = torch.frombuffer(content, dtype=torch.uint8)
            rows = serde.open_state(raw, key, self._seal)
        except StateMismatchError as error:
            self._drop(entry.path, error)
            return None

        def settle(load_ms: float, error: StateMismatchError | None) -> None:
            if error is not None:
                self._drop(entry.path, error)
                return
            self._folder.used(entry)
            self._reading.worked()
            self._counters.hit(opening_ms + load_ms, entry.nbytes)

        return Opened(rows, "disk", entry.nbytes, settle)

    def put(self, key: ModuleKey, state: KVState) -> bool:
        """Write the state and make room for it; False if it can't be kept.

        A state under the same key is replaced. The disk has it when this returns.
        """
        name = self._name(key)
        try:
            buffers = serde.encode(key, state, self.storage_dtype, self._seal, int(time.time()))
        except StateMismatchError as error:
            logger.warning("a state is not kept: %s", error)
            return False
        nbytes = sum(buffer.nbytes for buffer in buffers)
        if self._budget_bytes is not None and nbytes > self._budget_bytes:
            return False
        try:
            self._folder.write(name, buffers)
            if self._budget_bytes is not None:
                self._counters.evicted(self._folder.evict(self._budget_bytes))
        except OSError as error:
            self._writing.failed(error)
            return False
        self._writing.worked()
        return True

    def contains(self, key: ModuleKey) -> bool:
        """Whether a file of this name is there; what is in it, only `get` finds out."""
        return os.path.exists(self._folder.path(self._name(key)))

    def delete(self, key: ModuleKey) -> None:
        """Remove the state's file if it is there."""
        self._remove(self._folder.path(self._name(key)))

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
            usage = self._folder.usage()
        except OSError as error:
            self._reading.failed(error)
            usage = Usage(0, 0)
        return self._counters.stats(usage.states, usage.nbytes)

    def _name(self, key: ModuleKey) -> str:
        return stored_name(key.digest, self.storage_dtype)

    def _drop(self, path: Path, error: StateMismatchError) -> None:
        logger.warning("dropped the stored state %s: %s", path.name, error)
        self._counters.dropped()
        self._counters.missed()
        self._remove(path)

    def _remove(self, path: Path) -> None:
        try:
            self._folder.remove(path)
        except OSError as error:
            self._writing.failed(error)


def _checked_path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise OptionError(f"path must name a folder, got {path!r}")
    return Path(os.path.abspath(os.path.expanduser(os.fspath(path))))


def _check_nbytes(path: Path) -> None:
    """Raises: OSError. StateMismatchError: it is no regular file, or empty."""
    status = os.stat(path, follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        raise StateMismatchError("it is empty or no regular file")


def _mapped(path: Path) -> tuple[Entry, mmap.mmap]:
    """A file's bytes, mapped privately: writing to them changes no file. Reading them has begun.

    Raises: OSError: it is not there or can't be read. StateMismatchError: it was emptied meanwhile.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        status = os.fstat(descriptor)  # of this very file, should another have taken its place
        if not _is_cached(descriptor, status.st_size):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        content = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_COPY)
    except ValueError as error:
        raise StateMismatchError(f"it can't be mapped: {error}") from error
    finally:
        os.close(descriptor)
    return Entry.of(path, status), content


def _is_cached(descriptor: int, nbytes: int) -> bool:
    """Whether a file's beginning, middle and end are in memory; True where nobody can tell.

    A hint: asking for pages that are there already takes as long as finding out the hard way.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    byte = [bytearray(1)]
    try:
        return all(
            os.preadv(descriptor, byte, offset, os.RWF_NOWAIT)
            for offset in (0, nbytes // 2, nbytes - 1)
        )
    except BlockingIOError:
        return False
    except OSError:  # a file system that can't say
        return True
