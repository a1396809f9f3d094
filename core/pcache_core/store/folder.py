"""A folder of immutable files, shared by any number of processes and without an index.

A file is complete when its name appears: it is written under a temporary name, flushed to the disk
and renamed. A file's modification time says when it was last used, to the microsecond; its last
three digits (nanoseconds) count uses, up to 999. Reading a file changes neither.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pcache_core.errors import StateMismatchError, StoreError
from pcache_core.threads import fork_safe

SUFFIX = ".safetensors"
_TEMPORARY = ".tmp"
_NAME = re.compile(r"[0-9A-Za-z_-]{2,128}(\.[a-z0-9]+)?")
_SHARD = re.compile(r"[0-9A-Za-z_-]{2}")
_MOST_USES = 999
# A writer that was killed leaves its temporary file; no write takes as long as this.
_ABANDONED_NS = 600 * 10**9
# A folder that changed as recently may change again under the same time stamp.
_RACY_NS = 50 * 10**6
# How far the clocks of machines that share a folder may be apart.
_SKEW_US = 60 * 10**6
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Something in the folder, and its use.

    used_us: microseconds since 1970. uses: 999 means that many or more.
    trouble: why it is not the file of a state, such as "it is a pipe"; empty where it is one.
    """

    path: Path
    nbytes: int
    used_us: int
    uses: int
    trouble: str = ""

    @staticmethod
    def of(path: Path, status: os.stat_result, trouble: str = "") -> Entry:
        """Build one from what the file system says of it."""
        used_us, uses = divmod(status.st_mtime_ns, 1000)
        return Entry(path, status.st_size, used_us, uses, trouble)


@dataclass(frozen=True, slots=True)
class _Shard:
    """What a shard held when it was listed; good while its modification time stays."""

    changed_ns: int
    listed_ns: int
    states: int
    nbytes: int


class StateFolder:
    """Files by name in a folder of mode 0700, spread over shards by their first two characters.

    Thread-safe, and safe beside other processes with the same folder: whatever they add, use or
    remove meanwhile is seen or missed, never half seen.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._shards: dict[str, _Shard] = {}
        self._lock = fork_safe(threading.Lock())

    def create(self) -> None:
        """Make the folder if it is not there. Raises: OSError: it can't be made."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        self.root.mkdir(mode=0o700, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where a file of this name is, or would be. Raises: StoreError: not a name for a file."""
        if not _NAME.fullmatch(name):
            raise StoreError(f"{name!r:.80} can't name a file; keys have digests of hex digits")
        return self.root / name[:2] / (name + SUFFIX)

    def write(self, name: str, buffers: Iterable[memoryview]) -> None:
        """Write a file, replacing one of the same name. Raises: OSError: nothing was changed.

        The rename is not flushed: after a power cut the file may be missing, never incomplete.
        """
        path = self.path(name)
        self.create()
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if path.parent.is_symlink():
            raise NotADirectoryError(f"{path.parent} is a link out of the folder")
        temporary = path.parent / f"{name}.{os.getpid()}.{secrets.token_hex(4)}{_TEMPORARY}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(temporary, flags, 0o600)
        try:
            with open(descriptor, "wb") as file:
                for buffer in buffers:
                    file.write(buffer)
                file.flush()
                os.fsync(file.fileno())
            _stamp(temporary, uses=0)
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise

    def used(self, path: Path) -> None:
        """Note a use. In a folder that can't be written, use goes unnoticed."""
        with suppress(OSError):
            uses = Entry.of(path, os.lstat(path)).uses
            _stamp(path, uses=min(uses + 1, _MOST_USES))

    def remove(self, path: Path) -> bool:
        """Remove a file, or an empty folder in its place, and say whether it was there.

        Raises: OSError: it is there and can't be removed.
        """
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        except (IsADirectoryError, PermissionError):
            if not path.is_dir() or path.is_symlink():
                raise
            path.rmdir()
        return True

    def listing(self) -> Iterator[Entry]:
        """List everything but what is being written, in no order; what is not a state says why.

        Raises: OSError: the folder itself can't be read.
        """
        for item in _items(self.root):
            if not _is_shard(item):
                yield from _entries([item], "")
                continue
            try:
                yield from _entries(_items(item.path), item.name)
            except OSError as error:
                trouble = f"it can't be read: {error.strerror or error}"
                yield Entry(Path(item.path), 0, 0, 0, trouble)

    def usage(self) -> tuple[int, int]:
        """Count states, and their bytes. Only shards that changed since the last call are listed.

        Raises: OSError: the folder itself can't be read.
        """
        with self._lock:
            current: dict[str, _Shard] = {}
            for item in filter(_is_shard, _items(self.root)):
                with suppress(OSError):
                    current[item.name] = self._shard(item)
            self._shards = current
        return sum(s.states for s in current.values()), sum(s.nbytes for s in current.values())

    def evict(self, budget_bytes: int) -> int:
        """Remove least recently used states until the rest fits the budget; how many.

        A state that was used in the future goes first: its date says nothing. One that can't be
        removed is passed over. A little more goes if whole files fit into that little, so that a
        full folder of many files is not listed anew for every one that is added.
        """
        excess = self.usage()[1] - budget_bytes
        if excess <= 0:
            return 0
        slack = budget_bytes // 64
        states = [entry for entry in self.listing() if not entry.trouble]
        latest_us = time.time_ns() // 1000 + _SKEW_US
        states.sort(key=lambda entry: entry.used_us if entry.used_us <= latest_us else 0)
        removed = 0
        for entry in states:
            if excess <= 0 and entry.nbytes > excess + slack:
                break
            with suppress(OSError):
                removed += self.remove(entry.path)
                excess -= entry.nbytes
        return removed

    def _shard(self, folder: os.DirEntry[str]) -> _Shard:
        changed_ns = folder.stat(follow_symlinks=False).st_mtime_ns
        known = self._shards.get(folder.name)
        if known and known.changed_ns == changed_ns and known.listed_ns - changed_ns > _RACY_NS:
            return known
        listed_ns = time.time_ns()
        items = _items(folder.path)
        files = [entry for entry in _entries(items, folder.name) if not entry.trouble]
        if _sweep(items, listed_ns):
            changed_ns = 0
        return _Shard(changed_ns, listed_ns, len(files), sum(file.nbytes for file in files))


def open_file(path: Path) -> io.FileIO:
    """Open a regular file for reading. No link is followed, and nothing is waited for.

    Raises: OSError: it is not there or can't be read. StateMismatchError: it is not a file.
    """
    trouble = _trouble(os.stat(path, follow_symlinks=False))
    if trouble:
        raise StateMismatchError(trouble)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags)
    trouble = _trouble(os.fstat(descriptor))  # something else may have taken its place
    if trouble:
        os.close(descriptor)
        raise StateMismatchError(trouble)
    return io.FileIO(descriptor, "rb")


def _trouble(status: os.stat_result) -> str:
    if stat.S_ISREG(status.st_mode):
        return ""
    return f"it is {_KINDS.get(stat.S_IFMT(status.st_mode), 'a device')}"


def _items(folder: str | Path) -> list[os.DirEntry[str]]:
    """Raises: OSError: the folder can't be read."""
    try:
        with os.scandir(folder) as items:
            return list(items)
    except FileNotFoundError:
        return []


def _is_shard(item: os.DirEntry[str]) -> bool:
    return bool(_SHARD.fullmatch(item.name)) and item.is_dir(follow_symlinks=False)


def _entries(items: Iterable[os.DirEntry[str]], shard: str) -> Iterator[Entry]:
    for item in items:
        try:
            status = item.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        except OSError as error:
            trouble = f"it can't be read: {error.strerror or error}"
            yield Entry(Path(item.path), 0, 0, 0, trouble)
            continue
        if item.name.endswith(_TEMPORARY) and stat.S_ISREG(status.st_mode):
            continue
        name = item.name.removesuffix(SUFFIX)
        named = name != item.name and name[:2] == shard and _NAME.fullmatch(name)
        trouble = _trouble(status) or ("" if named else "it has not the name of a state")
        yield Entry.of(Path(item.path), status, trouble)


def _sweep(items: Iterable[os.DirEntry[str]], now_ns: int) -> bool:
    """Remove temporary files of writers that were killed; whether there are younger ones."""
    younger = False
    for item in items:
        if item.name.endswith(_TEMPORARY):
            with suppress(OSError):
                if now_ns - item.stat(follow_symlinks=False).st_mtime_ns > _ABANDONED_NS:
                    os.unlink(item.path)
                else:
                    younger = True
    return younger


def _stamp(path: Path, *, uses: int) -> None:
    stamp = time.time_ns() // 1000 * 1000 + uses
    os.utime(path, ns=(stamp, stamp), follow_symlinks=False)
