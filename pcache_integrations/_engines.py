"""Engines from the options that both integrations take."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any
from weakref import WeakValueDictionary

from pcache_core import CausalLM, DiskStore, MemoryStore, Preamble, PromptCacheEngine, TieredStore
from pcache_core.errors import OptionError
from pcache_core.params import check_repair, check_reuse
from pcache_core.store import LastingStore, ModuleStore
from pcache_core.store.packing import check_storage_dtype
from pcache_core.store.record import StorageDtype
from pcache_integrations.remote import Address, RemoteEngine

Engine = PromptCacheEngine | RemoteEngine
"""What answers prompts: a model in this process, or on a server."""

_loaded: WeakValueDictionary[tuple[str, str, str], CausalLM] = WeakValueDictionary()
_loading = threading.Lock()
_building = threading.Lock()


def load_lm(model: str, dtype: str = "auto", device: str = "auto") -> CausalLM:
    """Load a model, or share the one that is loaded: its weights are in memory once.

    Thread-safe. The weights go when nobody uses them any more.

    Raises: ModelError: the model can't be loaded.
    """
    with _loading:
        lm = _loaded.get((model, dtype, device))
        if lm is None:
            lm = CausalLM.from_pretrained(model, dtype=dtype, device=device)
            _loaded[model, dtype, device] = lm
        return lm


def check_store(spec: str, storage_dtype: str = "auto") -> None:
    """Whether `build_store` takes `spec`. No folder is made and no server is asked.

    Raises: OptionError: it does not. DependencyError: a package it needs is not installed.
    """
    check_storage_dtype(storage_dtype)
    if not isinstance(spec, str) or not spec.strip():
        raise OptionError(
            f"store={spec!r} must be 'memory', a folder's path, 'redis://host:port/database' or "
            "the URL of an object store such as 's3://bucket/folder'"
        )
    if "://" in spec:
        _remote_store(spec)
    elif spec != "memory" and get_close_matches(spec.lower(), ["memory"], cutoff=0.75):
        raise OptionError(f"store={spec!r}: did you mean 'memory'? A folder is './{spec}'")


def build_store(spec: str, storage_dtype: str = "auto") -> ModuleStore:
    """The store that `spec` names: memory alone, or memory before a folder or a server.

    storage_dtype: how the folder or server keeps numbers; memory keeps what comes.

    Raises: OptionError, DependencyError: as `check_store`. StoreError: the folder can't be made.
    """
    check_store(spec)
    if spec == "memory":
        return MemoryStore()
    return TieredStore([MemoryStore(), lasting_store(spec, storage_dtype)])


def lasting_store(spec: str, storage_dtype: str = "auto") -> LastingStore:
    """The folder or server alone: what `put` returned for is there when the process ends.

    Raises: OptionError: `spec` names memory, or is refused by `check_store`. DependencyError: as
        `check_store`. StoreError: the folder can't be made.
    """
    check_store(spec)
    if spec == "memory":
        raise OptionError(
            "store='memory' ends with this process; give a folder such as ./states, "
            "redis://host:port/database or an object store's URL"
        )
    dtype = check_storage_dtype(storage_dtype)
    return _remote_store(spec, dtype) if "://" in spec else DiskStore(spec, storage_dtype=dtype)


def _remote_store(url: str, storage_dtype: StorageDtype = "auto") -> LastingStore:
    """A store that connects when it is first used; its package is imported only here."""
    if url.partition("://")[0] in ("redis", "rediss", "valkey", "unix"):
        from pcache_core.store.redis import RedisStore

        return RedisStore(url, storage_dtype=storage_dtype)
    from pcache_core.store.object import ObjectStore

    return ObjectStore(url, storage_dtype=storage_dtype)


ENGINE_OPTIONS = (
    "model", "store", "dtype", "device", "namespace", "preamble", "repair", "storage_dtype",
)  # fmt: skip
"""Options of a language model that decide which engine it gets."""


SERVER_OPTIONS = ("base_url", "api_key", "timeout", "max_retries")
"""Options that say which server answers, and how it is asked."""


def server_address(
    base_url: str | None, api_key: str | None, timeout: float | None, max_retries: int | None
) -> Address | None:
    """The server that the options name; None for a model in this process.

    Without `base_url` the others have no effect: code written for any model passes them.

    Raises: OptionError: no address, or a value out of range.
    """
    if base_url is None:
        return None
    given = {"timeout_s": timeout, "max_retries": max_retries}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Address(base_url, api_key, **chosen)


def describe_engine(engine: Engine, options: Mapping[str, Any]) -> dict[str, Any]:
    """What an existing engine runs on, as options. Raises: OptionError: `options` say it too."""
    twice = [name for name in (*ENGINE_OPTIONS, "base_url") if name in options]
    if twice:
        raise OptionError(
            f"engine= brings its own {', '.join(twice)}; leave {'them' if twice[1:] else 'it'} out"
        )
    if isinstance(engine, RemoteEngine):
        return {
            "model": engine.lm.name,
            "base_url": engine.address.base_url,
            "namespace": engine.namespace,
            "preamble": engine.preamble,
            "reuse": engine.reuse,
        }
    return {
        "model": engine.lm.name,
        "dtype": str(engine.lm.dtype).removeprefix("torch."),
        "device": str(engine.lm.device),
        "namespace": engine.namespace,
        "preamble": engine.preamble,
        "repair": engine.repair,
        "storage_dtype": getattr(engine.store, "storage_dtype", "auto"),
        "reuse": engine.reuse,
    }


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is built from; checked when made.

    Equal options make equal engines: `reuse` is only its default, and may differ by call.

    Raises: OptionError: unknown reuse mode or store, a repair budget out of range.
    """

    model: str
    store: str
    dtype: str
    device: str
    namespace: str
    repair: float | None
    reuse: str = field(compare=False)
    preamble: Preamble | None = None
    storage_dtype: str = "auto"
    server: Address | None = None

    def __post_init__(self) -> None:
        check_reuse(self.reuse)
        check_repair(self.repair)
        check_store(self.store, self.storage_dtype)
        if self.server is not None:
            self._check_served()

    def _check_served(self) -> None:
        """Raises: OptionError: an option that is the server's to settle."""
        usual = {"store": "memory", "dtype": "auto", "device": "auto", "storage_dtype": "auto"}
        for name, value in usual.items():
            if getattr(self, name) != value:
                raise OptionError(
                    f"{name}={getattr(self, name)!r} is settled where the server is started "
                    "(`pcache serve`); leave it out beside base_url"
                )
        if self.repair is not None:
            raise OptionError("repair= has no effect on a server; leave it out beside base_url")


_built: WeakValueDictionary[EngineOptions, Engine] = WeakValueDictionary()


def build_engine(options: EngineOptions) -> Engine:
    """Build an engine, or share the one that was built of equal options. Thread-safe.

    It goes, with its weights and the states in memory, when no language model uses it any more.

    Raises: ModelError: the model can't be loaded, or its server not be reached. StoreError: the
        folder can't be made.
    """
    with _building:
        engine = _built.get(options)
        if engine is None:
            engine = _built[options] = _remote(options) if options.server else _local(options)
        return engine


def _local(options: EngineOptions) -> PromptCacheEngine:
    return PromptCacheEngine(
        load_lm(options.model, options.dtype, options.device),
        store=build_store(options.store, options.storage_dtype),
        reuse=check_reuse(options.reuse),
        namespace=options.namespace,
        preamble=options.preamble,
        repair=options.repair,
    )


def _remote(options: EngineOptions) -> RemoteEngine:
    assert options.server is not None
    return RemoteEngine(
        options.server,
        options.model,
        reuse=check_reuse(options.reuse),
        namespace=options.namespace,
        preamble=options.preamble,
    )


class EngineHandle:
    """An engine that is built when it is first needed. Thread-safe."""

    def __init__(self, options: EngineOptions, engine: Engine | None = None) -> None:
        self.options = options
        self._engine = engine
        self._lock = threading.Lock()

    @property
    def is_built(self) -> bool:
        """Whether `get` returns at once."""
        return self._engine is not None

    def get(self) -> Engine:
        """The engine, always the same. Raises: ModelError: the model can't be loaded."""
        with self._lock:
            if self._engine is None:
                self._engine = build_engine(self.options)
            return self._engine

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineHandle:
        """Itself: copies of a language model share weights and states."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds how to build the engine, not its weights and states."""
        return type(self), (self.options,)
