"""States in object storage, or any other place that fsspec reaches."""

from __future__ import annotations

import io
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from pcache_core.errors import DependencyError, OptionError, StateMismatchError, StoreError
from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import KVState
from pcache_core.params import StorageDtype
from pcache_core.store import serde
from pcache_core.store.base import Opened, Outage, ms_since
from pcache_core.store.folder import SUFFIX

try:
    import fsspec
except ImportError as error:
    raise DependencyError(
        "ObjectStore needs the fsspec package; pip install 'pcache-integrations[fsspec]'"
    ) from error

T = TypeVar("T")

_FIRST_READ_BYTES = 2**20
_PARALLEL_READS = 8
RETRY_S = 1.0  # how long an outage is believed before the next try
# Where an object appears when all of it has arrived. Elsewhere it is renamed when it has.
_ATOMIC = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "r2", "memory"}


class ObjectStore(serde.SealedStore):
    """A store at an fsspec URL, one object a state: `s3://bucket/states`, `gs://…`, `memory://…`.

    storage_options: passed to the file system, such as keys, endpoints and time-outs.
    storage_dtype, hmac_key: as for `DiskStore`.

    The storage bounds the bytes (lifecycle rules). Where it can't be reached, look-ups miss and
    `put` keeps nothing; that is said once, and it is tried again after a second.

    Raises: OptionError: an unknown protocol or storage dtype. DependencyError: the protocol's
        package is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        storage_options: Mapping[str, Any] | None = None,
        storage_dtype: StorageDtype = "auto",
        hmac_key: bytes | None = None,
    ) -> None:
        super().__init__("remote", None, storage_dtype, hmac_key)
        self._files, self._root = _open(url, dict(storage_options or {}))
        protocol = self._files.protocol
        names = {protocol} if isinstance(protocol, str) else set(protocol)
        self._is_atomic = bool(names & _ATOMIC)
        self._place = url.partition("?")[0]
        self._storage = Outage(f"the store at {self._place}", self._counters, retry_s=RETRY_S)

    def open_many(self, keys: Sequence[ModuleKey]) -> list[Opened | None]:
        """Return the states that are there, their bytes read; several at a time."""
        if len(keys) < 2:
            return [self._open(key) for key in keys]
        with ThreadPoolExecutor(min(_PARALLEL_READS, len(keys))) as pool:
            return list(pool.map(self._open, keys))

    def _open(self, key: ModuleKey) -> Opened | None:
        started = time.perf_counter()
        try:
            content = self._ask(lambda: self._read(self._path(key), key))
        except StateMismatchError as error:
            self._drop(key, error)
            return None
        if content is None:
            self._counters.add(misses=1)
            return None
        return self._opened(key, partial(io.BytesIO, content), ms_since(started))

    def put(self, key: ModuleKey, state: KVState) -> bool:
        """Write the state's object; False if that failed."""
        content = b"".join(self._encoded(key, state))
        return bool(content and self._ask(lambda: self._write(self._path(key), content)))

    def contains(self, key: ModuleKey) -> bool:
        """Return whether its object is there; False if that can't be found out."""
        return bool(self._ask(lambda: self._files.exists(self._path(key))))

    def delete(self, key: ModuleKey) -> None:
        """Remove the state's object if it is there."""
        self._ask(lambda: self._files.rm_file(self._path(key)))

    def check(self) -> None:
        """Raises: StoreError: no object can be written there, and why."""
        path = f"{self._root}/check"
        try:
            self._write(path, b"pcache")
            self._files.rm_file(path)
        except Exception as error:  # every file system has exceptions of its own
            raise StoreError(
                f"the store at {self._place} can't be written: {error or type(error).__name__}; "
                "check its address and who may write there"
            ) from error

    def _path(self, key: ModuleKey) -> str:
        return f"{self._root}/{key.digest[:2]}/{self._name(key)}{SUFFIX}"

    def _ask(self, question: Callable[[], T]) -> T | None:
        """Ask the storage; None if there is no such object, or the storage can't be reached."""
        if not self._storage.is_over:
            return None
        answer = None
        try:
            answer = question()
        except StateMismatchError:
            raise
        except FileNotFoundError:
            pass
        except Exception as error:  # every file system has exceptions of its own
            self._storage.failed(error)
            return None
        self._storage.worked()
        return answer

    def _read(self, path: str, key: ModuleKey) -> bytes:
        """Return the object's bytes: its beginning, then as much as its header says, and no more.

        Raises: StateMismatchError: the header is not that of a state of this key.
        """
        content: bytes = self._files.cat_file(path, start=0, end=_FIRST_READ_BYTES)
        header_nbytes = serde.header_nbytes(content[: serde.PREFIX_BYTES])
        if header_nbytes > len(content):
            content += self._files.cat_file(path, start=len(content), end=header_nbytes)
        layout = serde.parse_header(content[:header_nbytes])
        layout.record.check_is_of(key)
        if len(content) == _FIRST_READ_BYTES or layout.nbytes > len(content):
            content += self._files.cat_file(path, start=len(content), end=layout.nbytes + 1)
        return content

    def _write(self, path: str, content: bytes) -> bool:
        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        if self._is_atomic:
            self._files.pipe_file(path, content)
            return True
        temporary = f"{path}.{secrets.token_hex(8)}.tmp"
        try:
            self._files.pipe_file(temporary, content)
            self._files.mv(temporary, path)
        except BaseException:
            with suppress(Exception):
                self._files.rm_file(temporary)
            raise
        return True


def _open(url: object, options: dict[str, Any]) -> tuple[Any, str]:
    if not isinstance(url, str) or "://" not in url:
        raise OptionError(f"{url!r} is no URL; use such as s3://bucket/folder")
    try:
        files, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise DependencyError(f"no file system for {url.partition('://')[0]}: {error}") from error
    except ValueError as error:
        raise OptionError(f"{url.partition('?')[0]!r} can't be a store: {error}") from None
    return files, str(root).rstrip("/")
