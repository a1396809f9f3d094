"""What the completion and the chat model have in common: options, engine, documents, errors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from langchain_core import exceptions
from langchain_core.documents import Document
from langchain_core.language_models.base import BaseLanguageModel, LangSmithParams
from langchain_core.prompts import BasePromptTemplate
from pydantic import Field, SecretStr, ValidationError

from pcache_core import EncodeReport, Preamble, Prompt
from pcache_core.base_engine import Engine
from pcache_core.errors import (
    ChatTemplateError,
    ContextLengthError,
    DeadlineExceededError,
    ModelError,
    OptionError,
    OverloadedError,
    PromptCacheError,
    PromptError,
)
from pcache_core.params import DEFAULT_MODEL, DEFAULT_REUSE, ReuseMode, SamplingParams
from pcache_integrations._engines import (
    EngineHandle,
    EngineOwner,
    describe_engine,
    engine_options,
)
from pcache_integrations.calls import call_options, check_names
from pcache_integrations.langchain import schema
from pcache_integrations.langchain.watch import WATCHER, watch_chains

_OF_A_CALL = (
    "reuse", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed",
    "speculative",
)  # fmt: skip

_ANSWERS_DEPEND_ON = (
    "model", "dtype", "storage_dtype", "preamble", "repair", "base_url", *_OF_A_CALL,
)  # fmt: skip

# Errors by which LangChain's middleware knows what to do; some are in its newer versions only.
_STANDARD = (
    (ContextLengthError, "ContextOverflowError"),
    (DeadlineExceededError, "ModelTimeoutError"),
    (OverloadedError, "ModelRateLimitError"),
    ((ChatTemplateError, PromptError, OptionError), "ModelInvalidRequestError"),
    (ModelError, "ModelError"),
)


class CachedModel(EngineOwner, BaseLanguageModel[Any]):
    """Options and engine of a LangChain model.

    model: a built-in model, a directory, a hub id, a GGUF file or `ollama:NAME`.
    reuse: a reuse mode.
    preamble: what documents are encoded after; None for the model's own.
    repair: how much `balanced` and `high` compute again, instead of their own choice: an `int`
        counts tokens, a `float` is a share of the reused ones.
    store: where states are kept.
    dtype, device: of the model.
    namespace: states are shared within one only.
    storage_dtype: how a folder or server keeps states: `auto` as the model has them, or
        `float32`, `bfloat16`, `float16`, `int8`, which is a quarter of `float32`.
    trust_remote_code: run Python code that comes with the model.
    timeout: seconds that an answer may take; with `base_url`, that the server may keep silent.
    base_url: of a vLLM server that runs the model (`pcache serve`), instead of this process; with
        it the store, the dtype and the device are the server's.
    api_key, max_retries: how it is asked; without `base_url` they have no effect.
    engine_handle: how copies of this object share its engine.
    The others are those of `SamplingParams`.

    Raises: OptionError: an unknown option, or a value out of range.
    """

    model: str = DEFAULT_MODEL
    reuse: str = DEFAULT_REUSE
    preamble: Preamble | None = None
    repair: int | float | None = None
    store: str = "memory"
    dtype: str = "auto"
    device: str = "auto"
    namespace: str = "default"
    storage_dtype: str = "auto"
    trust_remote_code: bool = False
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    speculative: bool = True
    stop: list[str] | None = None
    base_url: str | None = None
    api_key: SecretStr | None = None
    timeout: float | None = None
    max_retries: int | None = None
    engine_handle: EngineHandle | None = Field(default=None, exclude=True, repr=False)

    def __init__(self, *, engine: Engine | None = None, **options: Any) -> None:
        """Check the options; the model is loaded when it is first needed.

        engine: an engine to share, instead of one made from `model`, `store`, `dtype`, `device`,
            `namespace` and `repair`.
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
        self._call_options(None, {})  # refuses a value out of range now, not at the first call
        watch_chains()

    def _settle(self) -> EngineHandle:
        held, wanted = self.engine_handle, engine_options(self)
        if held is None or held.options != wanted:
            held = EngineHandle(wanted) if held is None else held.for_options(wanted)
            self.engine_handle = held
        return held

    def schema_for(
        self,
        prompt_template: BasePromptTemplate[Any],
        *,
        name: str | None = None,
        lengths: Mapping[str, int] | None = None,
    ) -> str:
        """Return the PML schema of a prompt template.

        name: of the schema; made of the content when not given. lengths: the most tokens of each
            variable; 64 if not given.
        Raises: TemplateError: no schema can express the template.
        """
        return schema.schema_for(prompt_template, name=name, lengths=lengths)

    def cache_documents(
        self,
        documents: Iterable[Document | str],
        progress: bool = True,  # noqa: FBT001, FBT002 (the published signature)
    ) -> EncodeReport:
        """Precompute documents' states, and recognise the documents in any prompt from now on.

        Raises: OptionError: something else than documents or strings was given.
        """
        if isinstance(documents, (str, Document)):
            raise OptionError(
                f"cache_documents takes several documents, got one {type(documents).__name__}; "
                "put it in a list"
            )
        found = [_as_document(document) for document in documents]
        for document in found:
            WATCHER.add_documents(document)
        return self.engine.encode(
            [document.page_content.strip() for document in found], progress=progress
        )

    def get_token_ids(self, text: str) -> list[int]:
        """Return the ids of `text` for this model, without special tokens added."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return list(self.engine.lm.token_ids(text))

    @property
    def _place(self) -> str:
        return f"a call of {type(self).__name__}"

    @property
    def _own_options(self) -> dict[str, Any]:
        """What a call may say otherwise."""
        own = {name: getattr(self, name) for name in _OF_A_CALL}
        # A server's silence is timed where it is asked.
        return {**own, "stop": self.stop, "timeout_s": None if self.base_url else self.timeout}

    def _call_options(
        self, stop: list[str] | None, given: Mapping[str, Any]
    ) -> tuple[SamplingParams, ReuseMode]:
        """Check one call's options. `stop` takes the place of the model's own."""
        return call_options(self._own_options, as_sampling(given, stop), self._place)

    def _count(self, prompt: Prompt) -> int:
        return len(self.engine.tokenise(prompt).token_ids)

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Return everything that answers depend on: the key of LangChain's response caches."""
        options = {name: getattr(self, name) for name in _ANSWERS_DEPEND_ON}
        # LangChain keeps the stop strings of the call under "stop".
        return {**options, "default_stop": self.stop}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=self.stop if stop is None else stop, **kwargs)
        params["ls_provider"] = "pcache"
        return params


def as_sampling(given: Mapping[str, Any], stop: list[str] | None) -> dict[str, Any]:
    """Return a call's options by the engine's names: `timeout` is LangChain's for `timeout_s`."""
    named = {"timeout_s" if name == "timeout" else name: value for name, value in given.items()}
    return {**named, "stop": stop}


@contextmanager
def standard_errors() -> Iterator[None]:
    """Raise the project's errors as LangChain's standard ones, which they are then as well."""
    try:
        yield
    except PromptCacheError as error:
        for kinds, name in _STANDARD:
            standard = getattr(exceptions, name, None)
            if isinstance(error, kinds) and standard and not isinstance(error, standard):
                raise _standard_error(type(error), name, *error.args) from error
        raise


def _standard_error(kind: type[PromptCacheError], name: str, *args: Any) -> Exception:
    """Make an error that is of both kinds, also after it was pickled."""

    def rebuilt(error: Exception) -> tuple[Any, ...]:
        return _standard_error, (kind, name, *error.args)

    fields = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce__": rebuilt}
    made: Exception = type(kind.__name__, (kind, getattr(exceptions, name)), fields)(*args)
    return made


def _as_document(value: Document | str) -> Document:
    if isinstance(value, str):
        return Document(page_content=value)
    if isinstance(value, Document):
        return value
    raise OptionError(
        f"cache_documents takes LangChain documents or strings, got {type(value).__name__}"
    )
