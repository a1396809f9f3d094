"""Engines from the options that both integrations take."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from pcache_core import CausalLM, Preamble, PromptCacheEngine
from pcache_core.base_engine import Engine
from pcache_core.errors import OptionError
from pcache_core.params import check_repair, check_reuse
from pcache_integrations._stores import build_store, check_store

if TYPE_CHECKING:
    from pcache_integrations.vllm.client_http import Address

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
    from pcache_integrations.vllm.client_http import Address

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
    return engine.settings()


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
            engine = _built[options] = _new(options)
        return engine


def _new(options: EngineOptions) -> Engine:
    own: dict[str, Any] = {
        "reuse": check_reuse(options.reuse),
        "namespace": options.namespace,
        "preamble": options.preamble,
    }
    if options.server is not None:
        from pcache_integrations.vllm.client import RemoteEngine

        return RemoteEngine(options.server, options.model, **own)
    return PromptCacheEngine(
        load_lm(options.model, options.dtype, options.device),
        store=build_store(options.store, options.storage_dtype),
        repair=options.repair,
        **own,
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
