"""States on a Redis or Valkey server, shared by machines.

A state is kept as chunks under names of their own and a manifest that names them. The manifest is
written last, so a state is seen whole or not at all; chunks whose writer was interrupted expire.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import TypeVar, cast

import torch

from pcache_core.errors import StateMismatchError, StoreError
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
from pcache_core.store.packing import check_storage_dtype, stored_name
from pcache_core.store.record import StorageDtype
from pcache_core.store.redis_address import checked_ttl, client_of, redis, without_password
from pcache_core.store.redis_manifest import CHUNK_BYTES, Manifest
from pcache_core.store.seal import Seal

logger = logging.getLogger(__name__)
T = TypeVar("T")
_Answers = list[bytes | None]

_BATCH_CHUNKS = 16
RETRY_S = 1.0  # how long an outage is believed before the next try
# Chunks that no manifest names yet, and those of a manifest that is about to expire.
_UNFINISHED_S = 600
_GRACE_S = 60


class RedisStore:
    """A store on a server that other processes and machines use as well.

    url: `redis://[user:password@]host[:port][/database]`, `rediss://` (TLS), `valkey://` or
        `unix://path`. Whoever can read the database can read the texts.
    ttl_s: seconds a state is kept after it was written; None for as long as the server keeps it.
    timeout_s: of a connection and of each answer; values are chunks of 1 MiB.
    storage_dtype, hmac_key: as for `DiskStore`.

    The server bounds the bytes (`maxmemory`, `maxmemory-policy allkeys-lru`). When it can't be
    reached, look-ups miss and `put` keeps nothing; that is said once, and it is tried again after
    a second. Nothing here raises because of the server.

    Raises: OptionError: a bad URL, time or storage dtype.
    """

    def __init__(
        self,
        url: str,
        *,
        ttl_s: int | None = None,
        timeout_s: float = 2.0,
        storage_dtype: StorageDtype = "auto",
        hmac_key: bytes | None = None,
    ) -> None:
        self.storage_dtype = check_storage_dtype(storage_dtype)
        self._ttl_s = checked_ttl(ttl_s)
        self._seal = Seal(hmac_key)
        self._client = client_of(url, timeout_s)
        self._counters = Counters("remote", None)
        self._place = without_password(url)
        self._server = Outage(f"the store at {self._place}", self._counters, retry_s=RETRY_S)
        self._writing = Outage(f"writing states to {self._place}", self._counters)

    def get(self, key: ModuleKey) -> Hit | None:
        """The state if the server has it whole."""
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[ModuleKey]) -> list[Hit | None]:
        """What `get` returns for each key, in few round trips."""
        unique = list(dict.fromkeys(keys))
        opened = dict(zip(unique, self.open_many(unique), strict=True))
        return [read(opened[key]) for key in keys]

    def open_many(self, keys: Sequence[ModuleKey]) -> list[Opened | None]:
        """The states that the server has whole: one question for all, then their bytes.

        Round trips: one for the manifests, and one for every 16 MiB of all states together.
        """
        by_name = {self._name(key): key for key in keys}
        started = time.perf_counter()
        contents = (self._ask(lambda: self._contents(list(by_name))) or {}) if keys else {}
        elapsed_ms = milliseconds_since(started)
        total = sum(map(len, contents.values()))
        return [
            self._opened(key, contents[name], elapsed_ms / max(total, 1))
            if name in contents
            else self._missed()
            for name, key in by_name.items()
        ]

    def put(self, key: ModuleKey, state: KVState) -> bool:
        """Send the state; False if the server did not take all of it."""
        try:
            buffers = serde.encode(key, state, self.storage_dtype, self._seal, int(time.time()))
        except StateMismatchError as error:
            logger.warning("a state is not kept: %s", error)
            return False
        nbytes = sum(buffer.nbytes for buffer in buffers)
        manifest = Manifest(secrets.token_hex(8), -(-nbytes // CHUNK_BYTES), nbytes)
        return bool(self._ask(lambda: self._written(self._name(key), manifest, buffers)))

    def contains(self, key: ModuleKey) -> bool:
        """Whether the server names it; False if the server can't be asked."""
        return bool(self._ask(lambda: self._client.exists(self._name(key))))

    def delete(self, key: ModuleKey) -> None:
        """Remove the state if the server has it; an outage is noted like any other."""
        self._ask(lambda: self._remove(self._name(key)))

    def check(self) -> None:
        """Raises: StoreError: the server does not answer or takes no data, and why."""
        try:
            self._client.set("pcache:check", b"", ex=1)
        except (redis.RedisError, OSError) as error:
            reason = str(error).rstrip(".")
            raise StoreError(
                f"the server at {self._place} can't be used: {reason}; start it, or correct the "
                "address"
            ) from error

    def stats(self) -> StoreStats:
        """Counts so far. What the server holds in all is not known here."""
        return self._counters.stats(states=None, nbytes=None)

    def _name(self, key: ModuleKey) -> str:
        return f"pcache:{stored_name(key.digest, self.storage_dtype)}"

    def _ask(self, question: Callable[[], T]) -> T | None:
        """The server's answer; None while it can't be reached."""
        if not self._server.is_over:
            return None
        try:
            answer = question()
        except (redis.RedisError, OSError) as error:
            self._server.failed(error)
            return None
        self._server.worked()
        return answer

    def _contents(self, names: Sequence[str]) -> dict[str, bytearray]:
        """The stored bytes of those that are there and complete."""
        contents: dict[str, bytearray] = {}
        wanted: dict[str, Manifest] = {}
        texts = cast(_Answers, self._client.mget(names))
        for name, text in zip(names, texts, strict=True):
            if text is None:
                continue
            try:
                wanted[name] = Manifest.parse(text)
            except StateMismatchError:
                contents[name] = bytearray()  # dropped like any other damaged state
        return contents | self._joined(wanted)

    def _joined(self, manifests: Mapping[str, Manifest]) -> dict[str, bytearray]:
        """The chunks of each state, joined; those of which a chunk is gone are left out."""
        joined = {name: bytearray() for name in manifests}

        def names() -> Iterator[tuple[str, str]]:
            for name, manifest in manifests.items():
                for chunk_name in manifest.names(name):
                    # However many its manifest claims, nothing behind a missing one is asked for.
                    if name not in joined:
                        break
                    yield name, chunk_name

        for batch in _batches(names()):
            with self._client.pipeline(transaction=False) as pipeline:
                for _, chunk_name in batch:
                    pipeline.get(chunk_name)
                answers = pipeline.execute()
            for (name, _), chunk in zip(batch, answers, strict=True):
                if chunk is None:
                    joined.pop(name, None)
                elif name in joined:
                    joined[name] += chunk
        return joined

    def _missed(self) -> Opened | None:
        self._counters.missed()
        return None

    def _opened(self, key: ModuleKey, content: bytearray, ms_per_byte: float) -> Opened | None:
        nbytes = len(content)

        def settle(load_ms: float, error: StateMismatchError | None) -> None:
            if error is None:
                self._counters.hit(load_ms + nbytes * ms_per_byte, nbytes)
            else:
                self._drop(key, error)

        try:
            raw = torch.frombuffer(content, dtype=torch.uint8)
            rows = serde.open_state(raw, key, self._seal)
        except (StateMismatchError, ValueError) as error:  # ValueError: no bytes at all
            self._drop(key, error)
            return None
        return Opened(rows, "remote", nbytes, settle)

    def _drop(self, key: ModuleKey, error: Exception) -> None:
        logger.warning("dropped the stored state %s: %s", self._name(key), error)
        self._counters.dropped()
        self._counters.missed()
        self.delete(key)

    def _written(self, name: str, manifest: Manifest, buffers: Sequence[memoryview]) -> bool:
        try:
            self._send(name, manifest, buffers)
        except redis.ResponseError as error:  # out of memory, a read-only replica
            self._writing.failed(error)
            return False
        self._writing.worked()
        return True

    def _send(self, name: str, manifest: Manifest, buffers: Sequence[memoryview]) -> None:
        """Chunks first, the manifest last, then the chunks it replaces go."""
        names = list(manifest.names(name))
        for batch in _batches(zip(names, _chunks(buffers), strict=True)):
            with self._client.pipeline(transaction=False) as pipeline:
                for chunk_name, chunk in batch:
                    pipeline.set(chunk_name, chunk, ex=_UNFINISHED_S)
                pipeline.execute()
        with self._client.pipeline(transaction=True) as pipeline:
            for chunk_name in names:
                if self._ttl_s is None:
                    pipeline.persist(chunk_name)
                else:
                    pipeline.expire(chunk_name, self._ttl_s + _GRACE_S)
            pipeline.set(name, manifest.text(), ex=self._ttl_s, get=True)
            replaced = pipeline.execute()[-1]
        self._remove_chunks(name, replaced)

    def _remove(self, name: str) -> None:
        self._remove_chunks(name, cast("bytes | None", self._client.getdel(name)))

    def _remove_chunks(self, name: str, manifest: bytes | None) -> None:
        if manifest is None:
            return
        with suppress(StateMismatchError):
            for batch in _batches(Manifest.parse(manifest).names(name)):
                if not self._client.unlink(*batch):
                    return  # it claimed more than there are


def _batches(items: Iterable[T]) -> Iterator[Sequence[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, _BATCH_CHUNKS)):
        yield batch


def _chunks(buffers: Sequence[memoryview]) -> Iterator[bytes]:
    """The buffers' bytes, one after another, in pieces of one length; the last may be shorter."""
    waiting = bytearray()
    for buffer in buffers:
        for start in range(0, buffer.nbytes, CHUNK_BYTES):
            waiting += buffer[start : start + CHUNK_BYTES]
            if len(waiting) >= CHUNK_BYTES:
                yield bytes(waiting[:CHUNK_BYTES])
                del waiting[:CHUNK_BYTES]
    if waiting:
        yield bytes(waiting)
