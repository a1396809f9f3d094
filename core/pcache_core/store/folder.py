"""A folder of immutable files, shared by any number of processes and without an index.

A file is complete when its name appears: it is written under a temporary name, flushed to the disk
and renamed. A file's modification time says when it was last used, to the microsecond; its last
three digits (nanoseconds) count uses, up to 999. Reading a file changes neither.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pcache_core.errors import StoreError
from pcache_core.threads import fork_safe

SUFFIX = ".safetensors"
_TEMPORARY = ".tmp"
_NAME = re.compile(r"[0-9A-Za-z_-]{2,128}(\.[a-z0-9]+)?")
_MOST_USES = 999
# A writer that was killed leaves its temporary file; no write takes as long as this.
_ABANDONED_NS = 600 * 10**9
# A folder that changed as recently may change again under the same time stamp.
_RACY_NS = 50 * 10**6


@dataclass(frozen=True, slots=True)
class Entry:
    """A file and its use. used_us: microseconds since 1970. uses: 999 means that many or more."""

    path: Path
    nbytes: int
    used_us: int
    uses: int

    @property
    def name(self) -> str:
        """Its name in the folder."""
        return self.path.name.removesuffix(SUFFIX)

    @staticmethod
    def of(path: Path, status: os.stat_result) -> Entry:
        """From what the file system says of it."""
        used_us, uses = divmod(status.st_mtime_ns, 1000)
        return Entry(path, status.st_size, used_us, uses)


@dataclass(frozen=True, slots=True)
class Usage:
    """How much a folder holds."""

    states: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Shard:
    """What a shard held when it was listed; good while its modification time stays."""

    changed_ns: int
    listed_ns: int
    usage: Usage


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
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise

    def used(self, entry: Entry) -> None:
        """Note a use. In a folder that can't be written, use goes unnoticed."""
        with suppress(OSError):
            _stamp(entry.path, uses=min(entry.uses + 1, _MOST_USES))

    def remove(self, path: Path) -> bool:
        """Remove a file; whether it was there. Raises: OSError: it is there and can't be."""
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        return True

    def entries(self) -> Iterator[Entry]:
        """Every complete file, in no order. Raises: OSError: the folder can't be read."""
        for shard in self._shard_folders():
            yield from _files(Path(shard.path))

    def usage(self) -> Usage:
        """Files and bytes now. Only shards that changed since the last call are listed again."""
        with self._lock:
            current: dict[str, _Shard] = {}
            for folder in self._shard_folders():
                with suppress(FileNotFoundError):
                    current[folder.name] = self._shard(folder)
            self._shards = current
            usages = [shard.usage for shard in current.values()]
        return Usage(sum(u.states for u in usages), sum(u.nbytes for u in usages))

    def evict(self, budget_bytes: int) -> int:
        """Remove least recently used files until the rest fits the budget; how many.

        A little more goes if whole files fit into that little, so that a full folder of many files
        is not listed anew for every one that is added.
        """
        excess = self.usage().nbytes - budget_bytes
        if excess <= 0:
            return 0
        slack = budget_bytes // 64
        removed = 0
        for entry in sorted(self.entries(), key=lambda entry: entry.used_us):
            if excess <= 0 and entry.nbytes > excess + slack:
                break
            removed += self.remove(entry.path)
            excess -= entry.nbytes
        return removed

    def _shard(self, folder: os.DirEntry[str]) -> _Shard:
        changed_ns = folder.stat(follow_symlinks=False).st_mtime_ns
        known = self._shards.get(folder.name)
        if known and known.changed_ns == changed_ns and known.listed_ns - changed_ns > _RACY_NS:
            return known
        listed_ns = time.time_ns()
        files = list(_files(Path(folder.path)))
        usage = Usage(len(files), sum(file.nbytes for file in files))
        if _sweep(Path(folder.path), listed_ns):
            changed_ns = 0
        return _Shard(changed_ns, listed_ns, usage)

    def _shard_folders(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root) as items:
                return [i for i in items if len(i.name) == 2 and i.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []


def _files(folder: Path) -> Iterator[Entry]:
    try:
        with os.scandir(folder) as items:
            found = [item for item in items if item.name.endswith(SUFFIX)]
    except FileNotFoundError:
        return
    for item in found:
        with suppress(FileNotFoundError):
            yield Entry.of(Path(item.path), item.stat(follow_symlinks=False))


def _sweep(folder: Path, now_ns: int) -> bool:
    """Remove temporary files of writers that were killed; whether there are younger ones."""
    younger = False
    with suppress(OSError):
        for path in folder.glob(f"*{_TEMPORARY}"):
            if now_ns - path.stat().st_mtime_ns > _ABANDONED_NS:
                path.unlink()
            else:
                younger = True
    return younger


def _stamp(path: Path, *, uses: int) -> None:
    stamp = time.time_ns() // 1000 * 1000 + uses
    os.utime(path, ns=(stamp, stamp), follow_symlinks=False)
