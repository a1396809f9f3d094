"""Engines from the options that both integrations take.

Language models of equal options share an engine. The engines that were used last are kept when
their last owner is gone, since notebooks, scripts and request handlers make their language models
anew; but never the weights of more than one model that nobody uses.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakValueDictionary

from pcache_core import Preamble
from pcache_core.base_engine import Engine
from pcache_core.errors import OptionError, PromptCacheError
from pcache_core.params import check_repair, check_reuse
from pcache_integrations._stores import build_store, check_store

if TYPE_CHECKING:
    from pcache_core import CausalLM
    from pcache_integrations.vllm.client_http import Address

_loaded: WeakValueDictionary[tuple[str, str, str, bool], CausalLM] = WeakValueDictionary()
_loading = threading.Lock()
_building = threading.RLock()


def load_lm(
    model: str, dtype: str = "auto", device: str = "auto", *, trust_remote_code: bool = False
) -> CausalLM:
    """Load a model, or share the one that is loaded: its weights are in memory once.

    Thread-safe. The weights go when nobody uses them any more; those that are only kept for the
    next language model of their options go before others are loaded.

    Raises: ModelError: the model can't be loaded.
    """
    from pcache_core import CausalLM

    with _loading:
        name = model, dtype, device, trust_remote_code
        lm = _loaded.get(name)
        if lm is None:
            if _kept:
                _kept.clear()
                gc.collect()
            lm = CausalLM.from_pretrained(
                model, dtype=dtype, device=device, trust_remote_code=trust_remote_code
            )
            _loaded[name] = lm
        return lm


ENGINE_OPTIONS = (
    "model", "store", "dtype", "device", "namespace", "preamble", "repair", "storage_dtype",
    "trust_remote_code",
)  # fmt: skip
"""Options of a language model that decide which engine it gets."""


SERVER_OPTIONS = ("base_url", "api_key", "timeout", "max_retries")
"""Options that say which server answers, and how it is asked."""

_OF_A_GIVEN_ENGINE = ("namespace", "preamble", "repair")
"""Options that may change beside an engine that was handed over: its model and store serve them."""


def server_address(
    base_url: str | None, api_key: str | None, timeout: float | None, max_retries: int | None
) -> Address | None:
    """Return the server that the options name; None for a model in this process.

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
    trust_remote_code: bool = False
    server: Address | None = None

    def __post_init__(self) -> None:
        for name in ("model", "dtype", "device", "namespace"):
            if not isinstance(getattr(self, name), str):
                raise OptionError(f"{name} must be a text, got {getattr(self, name)!r:.80}")
        if not isinstance(self.trust_remote_code, bool):
            raise OptionError(f"trust_remote_code={self.trust_remote_code!r} must be True or False")
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


def engine_options(llm: Any) -> EngineOptions:
    """Return what the fields of a language model say about its engine.

    Raises: OptionError: a value that no engine can be built from.
    """
    key = llm.api_key
    key = key.get_secret_value() if hasattr(key, "get_secret_value") else key
    return EngineOptions(
        **{name: getattr(llm, name) for name in ENGINE_OPTIONS},
        reuse=llm.reuse,
        server=server_address(llm.base_url, key, llm.timeout, llm.max_retries),
    )


_MOST_KEPT = 8
_built: WeakValueDictionary[EngineOptions, Engine] = WeakValueDictionary()
_kept: dict[EngineOptions, Engine] = {}
"""Engines that stay without an owner, the one used last at the end; all of one model."""


def build_engine(options: EngineOptions) -> Engine:
    """Build an engine, or share the one that was built of equal options. Thread-safe.

    When no language model uses it any more, it stays for the next one of equal options, until
    engines of another model are used, or many others of this one.

    Raises: ModelError: the model can't be loaded, or its server not be reached. StoreError: the
        folder can't be made.
    """
    with _building:
        engine = _living(options)
        if engine is None:
            engine = _built[options] = _new(options)
            _keep(options, engine)
        return engine


def _living(options: EngineOptions) -> Engine | None:
    """Return the engine of these options, if there is one."""
    with _building:
        engine = _built.get(options)
        if engine is not None:
            _keep(options, engine)
        return engine


def _keep(options: EngineOptions, engine: Engine) -> None:
    """Keep an engine as the one used last."""
    for other in [name for name, kept in list(_kept.items()) if kept.lm is not engine.lm]:
        del _kept[other]
    _kept.pop(options, None)
    _kept[options] = engine
    if len(_kept) > _MOST_KEPT:
        del _kept[next(iter(_kept))]


def _new(options: EngineOptions) -> Engine:
    own: dict[str, Any] = {
        "reuse": check_reuse(options.reuse),
        "namespace": options.namespace,
        "preamble": options.preamble,
    }
    if options.server is not None:
        from pcache_integrations.vllm.client import RemoteEngine

        return RemoteEngine(options.server, options.model, **own)
    from pcache_core import PromptCacheEngine

    return PromptCacheEngine(
        load_lm(
            options.model,
            options.dtype,
            options.device,
            trust_remote_code=options.trust_remote_code,
        ),
        store=build_store(options.store, options.storage_dtype),
        repair=options.repair,
        **own,
    )


class EngineHandle:
    """The engine of some options, built when it is first needed. Thread-safe.

    engine: one that was handed over, instead of one that is built.
    """

    def __init__(self, options: EngineOptions, engine: Engine | None = None) -> None:
        self.options = options
        self._given = engine
        self._engine = _living(options) if engine is None else engine
        self._lock = threading.Lock()

    @property
    def is_built(self) -> bool:
        """Whether `get` returns at once."""
        return self._engine is not None

    def get(self) -> Engine:
        """Return the engine, always the same. Raises: ModelError: the model can't be loaded."""
        with self._lock:
            if self._engine is None:
                self._engine = build_engine(self.options)
            return self._engine

    def for_options(self, options: EngineOptions) -> EngineHandle:
        """Return the handle of these options: itself, if they are its own.

        Raises: OptionError: an engine was handed over that can't be changed so.
        """
        if options == self.options:
            return self
        if self._given is None:
            return EngineHandle(options)
        from pcache_core import PromptCacheEngine

        changed = [
            each.name
            for each in fields(options)
            if each.compare and getattr(options, each.name) != getattr(self.options, each.name)
        ]
        given = self._given
        if not isinstance(given, PromptCacheEngine) or set(changed) - {*_OF_A_GIVEN_ENGINE}:
            raise OptionError(
                f"{', '.join(changed)} can't be changed beside an engine= that was handed over; "
                "make a new language model from options, or from another engine"
            )
        engine = PromptCacheEngine(
            given.lm,
            given.store,
            check_reuse(options.reuse),
            options.namespace,
            options.preamble,
            options.repair,
            min_module_tokens=given.min_module_tokens,
        )
        return EngineHandle(options, engine)

    def release(self) -> None:
        """Let the engine go, unless it was handed over; `get` builds it again."""
        with self._lock, _building:
            engine, self._engine = self._engine, self._given
            if engine is not None:
                engine.flush()
            _kept.pop(self.options, None)
        del engine
        gc.collect()  # an engine and its parts know each other

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineHandle:
        """Return itself: copies of a language model share weights and states."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Return a pickle holds how to build the engine, not its weights and states."""
        return type(self), (self.options,)


class EngineOwner:
    """What both language model classes have: the engine that their fields describe.

    However a field came to its value (constructor, assignment, a copy with `update=`), the engine
    that answers is the one of the present fields.
    """

    @property
    def engine(self) -> Engine:
        """Return the engine; the first use loads the model. Raises: ModelError: it can't."""
        engine: Engine = self._settle().get()
        return engine

    def close(self) -> None:
        """Let go of the engine: what it keeps in memory, and its weights if nobody else uses them.

        An engine is kept otherwise, for the next object of equal options. A closed object may be
        used again, and loads the model again then. `with` closes at its end.
        """
        self._settle().release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def model_copy(self, **how: Any) -> Self:
        """Copy, with other values as `update`. Raises: OptionError: no engine can be of them."""
        copy: Self = super().model_copy(**how)  # type: ignore[misc]
        copy._settle()
        return copy

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign. Raises: OptionError: no engine can be of this value, and the old one stays."""
        is_deciding = name in ENGINE_OPTIONS or name in SERVER_OPTIONS or name == "reuse"
        before = getattr(self, name, None)
        super().__setattr__(name, value)
        if is_deciding:
            try:
                self._settle()
            except PromptCacheError:
                super().__setattr__(name, before)
                raise

    def _settle(self) -> EngineHandle:
        """Return the handle of the engine that the fields describe, and hold it from now on."""
        raise NotImplementedError
