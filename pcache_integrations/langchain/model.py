"""What the completion and the chat model have in common: options, engine, documents, errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, closing, contextmanager
from typing import Any

from langchain_core import exceptions
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.documents import Document
from langchain_core.language_models.base import BaseLanguageModel, LangSmithParams
from langchain_core.prompts import BasePromptTemplate
from pydantic import Field

from pcache_core import EncodeReport, Prompt
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
from pcache_core.params import ReuseMode, SamplingParams
from pcache_integrations._engines import EngineOwner
from pcache_integrations.calls import OF_A_CALL, Call, call_options
from pcache_integrations.langchain import schema
from pcache_integrations.langchain.watch import WATCHER, watch_chains

_ANSWERS_DEPEND_ON = (  # LangChain itself adds the stop strings
    "model", "dtype", "storage_dtype", "preamble", "repair", "base_url",
    *(name for name in OF_A_CALL if name != "stop"),
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
    """A LangChain model: options and engine, documents, counts of tokens."""

    stop: list[str] | None = Field(default=None, description="Strings that end generation.")

    def __init__(self, *, engine: Engine | None = None, **options: Any) -> None:
        super().__init__(engine=engine, **options)
        watch_chains()

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
        if isinstance(documents, (str, Document)) or not isinstance(documents, Iterable):
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

    def _call_options(
        self, stop: list[str] | None, given: Mapping[str, Any]
    ) -> tuple[SamplingParams, ReuseMode]:
        """Check one call's options. `stop` takes the place of the model's own."""
        return call_options(self._own_options, {**given, "stop": stop}, self._place)

    def _answer(self, call: Call) -> Any:
        """Return what makes LangChain's results of the engine's."""
        raise NotImplementedError

    def _pieces(
        self,
        prepare: Callable[[], tuple[Prompt, Call]],
        run_manager: CallbackManagerForLLMRun | None,
    ) -> Iterator[Any]:
        """Stream an answer; a consumer or a callback that fails ends the request."""
        with standard_errors():
            prompt, call = prepare()
            answer = self._answer(call)
            with closing(self.engine.stream(prompt, call.params, call.reuse)) as parts:
                for part in parts:
                    chunk = answer.piece(part)
                    if run_manager:
                        run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    async def _apieces(
        self,
        prepare: Callable[[], tuple[Prompt, Call]],
        run_manager: AsyncCallbackManagerForLLMRun | None,
    ) -> AsyncIterator[Any]:
        """Stream as `_pieces` does; what loads the model or reads texts is done in a thread."""
        with standard_errors():
            prompt, call = await asyncio.to_thread(prepare)
            answer = self._answer(call)
            async with aclosing(self.engine.astream(prompt, call.params, call.reuse)) as parts:
                async for part in parts:
                    chunk = answer.piece(part)
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

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
