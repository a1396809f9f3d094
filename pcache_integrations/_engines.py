"""Engines from the options that both integrations take.

Language models of equal options share an engine. The engines that were used last are kept when
their last owner is gone, since notebooks, scripts and request handlers make their language models
anew; but never the weights of more than one model that nobody uses.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakValueDictionary

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from pcache_core import Preamble
from pcache_core.base_engine import Engine
from pcache_core.errors import OptionError, PromptCacheError
from pcache_core.params import (
    DEFAULT_MODEL,
    DEFAULT_REUSE,
    check_namespace,
    check_repair,
    check_reuse,
)
from pcache_integrations._stores import build_store, check_store
from pcache_integrations.calls import OF_A_CALL, call_options, check_names

if TYPE_CHECKING:
    from pcache_core import CausalLM
    from pcache_integrations.vllm.client_http import Address

_loaded: WeakValueDictionary[tuple[str, str, str, bool], CausalLM] = WeakValueDictionary()
_loading = threading.Lock()
_building = threading.Lock()  # held as long as that takes
_keeping = threading.Lock()


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
                with _keeping:
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

_DECIDING = (*ENGINE_OPTIONS, *SERVER_OPTIONS, "reuse")

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
    brought = engine.settings()
    server = [name for name in SERVER_OPTIONS if name in brought or name == "base_url"]
    twice = [name for name in (*ENGINE_OPTIONS, *server) if name in options]
    if twice:
        raise OptionError(
            f"engine= brings its own {', '.join(twice)}; leave {'them' if twice[1:] else 'it'} out"
        )
    return brought


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
        check_namespace(self.namespace)
        for name in ("model", "dtype", "device"):
            if not isinstance(getattr(self, name), str):
                raise OptionError(f"{name} must be a text, got {getattr(self, name)!r:.80}")
        if not isinstance(self.trust_remote_code, bool):
            raise OptionError(f"trust_remote_code={self.trust_remote_code!r} must be True or False")
        check_reuse(self.reuse)
        check_repair(self.repair)
        check_store(self.store, self.storage_dtype)
        if self.server is not None:
            self._check_served()

    def describe(self, llm: EngineOwner) -> bool:
        """Return whether the fields of a language model without a server say just this."""
        said, own = ([getattr(each, n) for n in ENGINE_OPTIONS] for each in (llm, self))
        alike = said == own and list(map(type, said)) == list(map(type, own))
        return alike and self.server is None and llm.base_url is None

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


def engine_options(llm: EngineOwner) -> EngineOptions:
    """Return what the fields of a language model say about its engine.

    Raises: OptionError: a value that no engine can be built from.
    """
    key = None if llm.api_key is None else llm.api_key.get_secret_value()
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
    """Return the engine of these options, if there is one; waits for none that is being built."""
    engine = _built.get(options)
    if engine is not None:
        _keep(options, engine)
    return engine


def _keep(options: EngineOptions, engine: Engine) -> None:
    """Keep an engine as the one used last."""
    with _keeping:
        for other in [name for name, kept in _kept.items() if kept.lm is not engine.lm]:
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
        with self._lock:
            engine, self._engine = self._engine, self._given
            if engine is not None:
                engine.flush()
            with _keeping:
                _kept.pop(self.options, None)
        del engine
        gc.collect()  # an engine and its parts know each other

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineHandle:
        """Return itself: copies of a language model share weights and states."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle how to build the engine, not its weights and states."""
        return type(self), (self.options,)


class EngineOwner(BaseModel):
    """What all language model classes have: their options, and the engine that these describe.

    However a field came to its value (constructor, assignment, a copy with `update=`), the engine
    that answers is the one of the present fields.

    Raises: OptionError: an unknown option, a value out of range, or both `engine` and an option
        that it has settled.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: str = Field(
        default=DEFAULT_MODEL,
        description="A built-in model, a directory, a hub id, a GGUF file or ollama:NAME.",
    )
    reuse: str = Field(
        default=DEFAULT_REUSE, description="What is reused: off, exact, fast, balanced or high."
    )
    preamble: Preamble | None = Field(
        default=None, description="What documents are encoded after, if not the model's own."
    )
    repair: int | float | None = Field(
        default=None,
        description="How much balanced and high compute again, if not what they choose: an int "
        "counts tokens, a float is a share of the reused ones.",
    )
    store: str = Field(
        default="memory",
        description="Where states are kept: memory, a folder, or the URL of a server or an "
        "object store.",
    )
    storage_dtype: str = Field(
        default="auto",
        description="How folders and servers keep states: auto as the model has them, or float32, "
        "bfloat16, float16, int8, which is a quarter of float32.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the model."
    )
    dtype: str = Field(default="auto", description="The model's number format.")
    device: str = Field(default="auto", description="Where the model runs.")
    namespace: str = Field(default="default", description="States are shared only inside of it.")
    max_tokens: int = Field(default=256, description="Most tokens to generate.")
    temperature: float = Field(default=0.0, description="0 takes the likeliest token.")
    top_p: float = Field(default=1.0, description="Sample from this much probability.")
    top_k: int = Field(default=0, description="Sample from the k likeliest tokens; 0 from all.")
    min_p: float = Field(default=0.0, description="Least probability relative to the likeliest.")
    repetition_penalty: float = Field(default=1.0, description="Above 1 avoids repetition.")
    seed: int | None = Field(default=None, description="Makes sampling repeatable.")
    speculative: bool = Field(
        default=True,
        description="Try several tokens at once where the answer may quote the prompt.",
    )
    stop: str | list[str] | None = Field(default=None, description="Strings that end generation.")
    base_url: str | None = Field(
        default=None,
        description="Of a vLLM server that runs the model (`pcache serve`), instead of this "
        "process; store, dtype and device are the server's then.",
    )
    api_key: SecretStr | None = Field(default=None, description="Of that server.", exclude=True)
    timeout: float | None = Field(
        default=None,
        description="Seconds that an answer may take; with base_url, that the server may keep "
        "silent.",
    )
    max_retries: int | None = Field(default=None, description="Of connections to that server.")
    engine_handle: EngineHandle | None = Field(
        default=None, exclude=True, repr=False, description="How copies share the engine."
    )

    def __init__(self, *, engine: Engine | None = None, **options: Any) -> None:
        """Check the options; the model is loaded when it is first needed.

        engine: one to share, instead of one that is made from the options.
        """
        place = type(self).__name__
        check_names(options, type(self).model_fields, place)
        if engine is not None:
            options = {**describe_engine(engine, options), **options}
        if isinstance(options.get("model"), os.PathLike):
            options["model"] = os.fspath(options["model"])
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise OptionError(f"{place}: {error}") from error
        if engine is not None:
            self.engine_handle = EngineHandle(engine_options(self), engine)
        self._settle()
        call_options(self._own_options, {}, place)  # refuses a value out of range now

    @property
    def engine(self) -> Engine:
        """Return the engine; the first use loads the model. Raises: ModelError: it can't."""
        return self._settle().get()

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
        copy = super().model_copy(**how)
        copy._settle()
        return copy

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign. Raises: OptionError: no engine can be of this value, and the old one stays."""
        before = getattr(self, name, None)
        super().__setattr__(name, value)
        if name in _DECIDING:
            try:
                self._settle()
            except PromptCacheError:
                super().__setattr__(name, before)
                raise

    @property
    def _own_options(self) -> dict[str, Any]:
        """Return what a call may say otherwise. A server's silence is timed where it is asked."""
        own = {name: getattr(self, name) for name in OF_A_CALL}
        return {**own, "timeout_s": None if self.base_url else self.timeout}

    def _settle(self) -> EngineHandle:
        """Return the handle of the engine that the fields describe, and hold it from now on."""
        check_reuse(self.reuse)
        held = self.engine_handle
        if held is None or not held.options.describe(self):
            wanted = engine_options(self)
            held = EngineHandle(wanted) if held is None else held.for_options(wanted)
            self.engine_handle = held
        return held
