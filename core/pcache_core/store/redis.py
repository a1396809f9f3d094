"""States on a Redis or Valkey server, shared by machines.

A state is kept as chunks under names of their own and a manifest that names them. The manifest is
written last, so a state is seen whole or not at all; chunks whose writer was interrupted expire.
"""

from __future__ import annotations

import io
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import TypeGuard, TypeVar, cast
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from pcache_core.errors import DependencyError, OptionError, StateMismatchError, StoreError
from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import KVState
from pcache_core.params import StorageDtype
from pcache_core.store import serde
from pcache_core.store.base import Opened, Outage, ms_since

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise DependencyError(
        "RedisStore needs the redis package; pip install 'pcache-integrations[redis]'"
    ) from error

T = TypeVar("T")
_Answers = list[bytes | None]

CHUNK_BYTES = 2**20
_MANIFEST = re.compile(rb"([0-9a-f]{16}):([1-9][0-9]{0,6}):([1-9][0-9]{0,12})")
_BATCH_CHUNKS = 16
RETRY_S = 1.0  # how long an outage is believed before the next try
# Chunks that no manifest names yet, and those of a manifest that is about to expire.
_UNFINISHED_S = 600
_GRACE_S = 60
_MOST_TTL_S = 100 * 366 * 86_400
_SCHEMES = {"redis": "redis", "rediss": "rediss", "unix": "unix", "valkey": "redis"}
_WHOLE, _SECONDS, _FLAG = "[0-9]{1,9}", "[0-9]{1,9}([.][0-9]+)?", "(?i:true|false|yes|no|[tfyn01])"
# What may stand after an address's question mark, and how its values look.
_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "db": _WHOLE,
        "username": ".+",
        "password": ".+",
        "client_name": "[!-~]+",
        "protocol": "[23]",
        "max_connections": "[1-9][0-9]{0,8}",
        "health_check_interval": _WHOLE,
        "socket_timeout": _SECONDS,
        "socket_connect_timeout": _SECONDS,
        "socket_keepalive": _FLAG,
        "retry_on_timeout": _FLAG,
        "decode_responses": _FLAG,  # has no effect: states are bytes
        "ssl_cert_reqs": "none|optional|required",
        "ssl_check_hostname": _FLAG,
        "ssl_ca_certs": ".+",
        "ssl_ca_path": ".+",
        "ssl_certfile": ".+",
        "ssl_keyfile": ".+",
        "ssl_password": ".+",
    }
)


class RedisStore(serde.SealedStore):
    """A store on a server that other processes and machines use as well.

    url: `redis://[user:password@]host[:port][/database]`, `rediss://` (TLS), `valkey://` or
        `unix://path`, with options of redis-py's after a question mark. Whoever can read the
        database can read the texts.
    ttl_s: seconds a state is kept after it was written; None for as long as the server keeps it.
    timeout_s: of a connection and of each answer; values are chunks of 1 MiB.
    storage_dtype, hmac_key: as for `DiskStore`.

    The server bounds the bytes (`maxmemory`, `maxmemory-policy allkeys-lru`). When it can't be
    reached, look-ups miss and `put` keeps nothing; that is said once, and it is tried again after
    a second. Nothing here raises because of the server.

    Raises: OptionError: a bad URL, option, time or storage dtype.
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
        super().__init__("remote", None, storage_dtype, hmac_key)
        self._ttl_s = _checked_ttl(ttl_s)
        self._client = _client_of(url, timeout_s)
        self._place = without_password(url)
        self._server = Outage(f"the store at {self._place}", self._counters, retry_s=RETRY_S)
        self._writing = Outage(f"writing states to {self._place}", self._counters)

    def open_many(self, keys: Sequence[ModuleKey]) -> list[Opened | None]:
        """Return the states that the server has whole: one question for all, then their bytes.

        Round trips: one for the manifests, and one for every 16 MiB of all states together.
        """
        by_name = {self._name(key): key for key in keys}
        started = time.perf_counter()
        contents = (self._ask(lambda: self._contents(list(by_name))) or {}) if keys else {}
        elapsed_ms = ms_since(started)
        total = sum(map(len, contents.values()))
        return [
            self._found(key, contents.get(name), elapsed_ms / max(total, 1))
            for name, key in by_name.items()
        ]

    def _found(self, key: ModuleKey, content: bytes | None, ms_per_byte: float) -> Opened | None:
        if content is None:
            self._counters.add(misses=1)
            return None
        return self._opened(key, partial(io.BytesIO, content), len(content) * ms_per_byte)

    def put(self, key: ModuleKey, state: KVState) -> bool:
        """Send the state; False if the server did not take all of it."""
        buffers = self._encoded(key, state)
        if not buffers:
            return False
        nbytes = sum(buffer.nbytes for buffer in buffers)
        manifest = Manifest(secrets.token_hex(8), -(-nbytes // CHUNK_BYTES), nbytes)
        return bool(self._ask(lambda: self._written(self._name(key), manifest, buffers)))

    def contains(self, key: ModuleKey) -> bool:
        """Return whether the server names it; False if the server can't be asked."""
        return self._ask(lambda: self._client.type(self._name(key))) == b"string"

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

    def _name(self, key: ModuleKey) -> str:
        return f"pcache:{super()._name(key)}"

    def _ask(self, question: Callable[[], T]) -> T | None:
        """Ask the server; None while it can't be reached."""
        if not self._server.is_over:
            return None
        try:
            answer = question()
        except (redis.RedisError, OSError) as error:
            self._server.failed(error)
            return None
        self._server.worked()
        return answer

    def _contents(self, names: Sequence[str]) -> dict[str, bytes]:
        """Return the stored bytes of those that are there and complete."""
        contents: dict[str, bytes] = {}
        wanted: dict[str, Manifest] = {}
        texts = cast(_Answers, self._client.mget(names))
        for name, text in zip(names, texts, strict=True):
            if text is None:
                continue
            try:
                wanted[name] = Manifest.parse(text)
            except StateMismatchError:
                contents[name] = b""  # dropped like any other damaged state
        return contents | self._joined(wanted)

    def _joined(self, manifests: Mapping[str, Manifest]) -> dict[str, bytes]:
        """Return the chunks of each state, joined; those of which a chunk is gone are left out."""
        joined: dict[str, list[bytes]] = {name: [] for name in manifests}

        def names() -> Iterator[tuple[str, str]]:
            for name, manifest in manifests.items():
                for chunk_name in manifest.names(name):
                    # However many its manifest claims, nothing after a missing one is asked for.
                    if name not in joined:
                        break
                    yield name, chunk_name

        for batch in _batches(names()):
            with self._client.pipeline(transaction=False) as pipeline:
                for _, chunk_name in batch:
                    pipeline.get(chunk_name)
                answers = pipeline.execute(raise_on_error=False)
            for (name, _), chunk in zip(batch, answers, strict=True):
                if not _is_chunk(chunk):
                    joined.pop(name, None)
                elif name in joined:
                    joined[name].append(chunk)
        return {name: b"".join(chunks) for name, chunks in joined.items()}

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
            pipeline.mget([name])  # None, and no error, where another type has the name
            pipeline.set(name, manifest.text(), ex=self._ttl_s)
            ((replaced,), _) = pipeline.execute()[-2:]
        self._remove_chunks(name, replaced)

    def _remove(self, name: str) -> None:
        with self._client.pipeline(transaction=True) as pipeline:
            pipeline.mget([name])
            pipeline.unlink(name)
            ((manifest,), _) = pipeline.execute()
        self._remove_chunks(name, manifest)

    def _remove_chunks(self, name: str, manifest: bytes | None) -> None:
        if manifest is None:
            return
        with suppress(StateMismatchError):
            for batch in _batches(Manifest.parse(manifest).names(name)):
                if not self._client.unlink(*batch):
                    return  # it claimed more than there are


def _is_chunk(answer: bytes | Exception | None) -> TypeGuard[bytes]:
    """Raises: RedisError: the server's answer, unless something else has the chunk's name."""
    if isinstance(answer, Exception) and not str(answer).startswith("WRONGTYPE"):
        raise answer
    return isinstance(answer, bytes)


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


@dataclass(frozen=True, slots=True)
class Manifest:
    """Names the chunks of a state. writing: tells one writing of it from another."""

    writing: str
    chunks: int
    nbytes: int

    @staticmethod
    def parse(text: bytes) -> Manifest:
        """Raises: StateMismatchError: not a manifest."""
        match = _MANIFEST.fullmatch(text)
        if match is None:
            raise StateMismatchError("its manifest is not as it was written")
        manifest = Manifest(match[1].decode(), int(match[2]), int(match[3]))
        if manifest.chunks != -(-manifest.nbytes // CHUNK_BYTES):
            raise StateMismatchError("its manifest contradicts itself")
        return manifest

    def text(self) -> str:
        """As it is kept; `parse` reads it."""
        return f"{self.writing}:{self.chunks}:{self.nbytes}"

    def names(self, name: str) -> Iterator[str]:
        """Of the chunks of the state of that name, in order."""
        return (f"{name}:{self.writing}:{index}" for index in range(self.chunks))


def without_password(url: str) -> str:
    """Return the address as it may be logged."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


def _client_of(url: object, timeout_s: object) -> redis.Redis:
    """Make a client that connects when it is first used, and again when a connection has died."""
    number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
    if not (number and math.isfinite(timeout_s) and 0 < timeout_s <= _MOST_TTL_S):  # type: ignore[arg-type, operator]
        raise OptionError(f"timeout_s={timeout_s!r} must be a number of seconds above 0")
    address = _checked_address(url)
    text = address.geturl()
    times = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    try:
        client = redis.Redis.from_url(
            text,
            **times,
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )
        pool = client.connection_pool
        pool.connection_kwargs["decode_responses"] = False
        pool.connection_class(**pool.connection_kwargs)  # not yet connected
    except (ValueError, TypeError, redis.RedisError) as error:
        raise OptionError(f"{without_password(text)!r} can't be used: {error}") from None
    return client


def _checked_address(url: object) -> SplitResult:
    """Raises: OptionError: it is not an address, or an option is unknown or out of range."""
    said = without_password(url) if isinstance(url, str) else repr(url)[:80]
    scheme, _, rest = url.partition("://") if isinstance(url, str) else ("", "", "")
    if scheme not in _SCHEMES:
        raise OptionError(
            f"{said!r} is not the address of a server; "
            "use redis://host:port/database, rediss://, valkey:// or unix://path"
        )
    try:
        address = urlsplit(f"{_SCHEMES[scheme]}://{rest}")
        host, port, path = address.hostname or "", address.port, unquote(address.path)
        (host + rest).encode("utf-8")
        host.encode("idna")
    except ValueError:  # its message may quote the password
        raise OptionError(
            f"{said!r} has a host or a port (1 to 65535) that can't be; characters such as # and @ "
            "in a password are written %23 and %40"
        ) from None
    local = scheme == "unix"
    if (
        not re.fullmatch("/?" if local else f"/?({_WHOLE})?", "" if local else path)
        or (local and not path)
        or port == 0
        or address.fragment
        or not (unquote(host) + path).isprintable()
        or " " in unquote(host)
    ):
        raise OptionError(
            f"{said!r} must end in the number of a database, as redis://host:port/0, and "
            "unix:// in a path"
        )
    for name, value in parse_qsl(address.query, keep_blank_values=True):
        if name not in _OPTIONS:
            raise OptionError(f"{said!r} has option {name!r:.40}; known are {', '.join(_OPTIONS)}")
        if not re.fullmatch(_OPTIONS[name], value) or value.strip("0.") == "" and "timeout" in name:
            shown = "" if "password" in name else f"={value!r:.40}"
            raise OptionError(f"{said!r}: option {name}{shown} has a value that it can't have")
        if name.startswith("ssl_") and scheme != "rediss":
            raise OptionError(f"{said!r}: option {name} is for TLS; use rediss://")
    return address


def _checked_ttl(ttl_s: object) -> int | None:
    """Return it. Raises: OptionError: not a whole number of seconds above 0, or 100 years."""
    if ttl_s is None:
        return None
    if isinstance(ttl_s, int) and not isinstance(ttl_s, bool) and 0 < ttl_s <= _MOST_TTL_S:
        return ttl_s
    raise OptionError(
        f"ttl_s={ttl_s!r} must be a whole number of seconds above 0, {_MOST_TTL_S:,} at most, or "
        "None"
    )
