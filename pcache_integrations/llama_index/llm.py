"""An LLM for LlamaIndex that reuses the attention states of what prompts have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr, ValidationError
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.llms.llm import default_completion_to_prompt
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.schema import BaseNode, NodeWithScore

from pcache_core import EncodeReport, Prompt, PromptCacheEngine, SamplingParams
from pcache_core.errors import OptionError
from pcache_core.params import DEFAULT_REUSE, RepairPolicy, ReuseMode
from pcache_integrations._engines import (
    ENGINE_OPTIONS,
    EngineHandle,
    EngineOptions,
    describe_engine,
)
from pcache_integrations._options import call_options, check_names
from pcache_integrations.llama_index import _responses as responses
from pcache_integrations.llama_index import _schema
from pcache_integrations.llama_index._automap import AutoMap
from pcache_integrations.llama_index._capture import CAPTURE
from pcache_integrations.llama_index._documents import (
    PruneReport,
    encode_documents,
    note_documents,
    prune,
    release,
)
from pcache_integrations.llama_index._handlers import install_handlers
from pcache_integrations.llama_index._lazy import LazyEngine
from pcache_integrations.llama_index._messages import ChatTemplate
from pcache_integrations.llama_index._prompts import chat_prompt, text_prompt, wrapped_prompt
from pcache_integrations.llama_index._sources import Source

_OF_A_CALL = (
    "reuse", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed",
    "stop",
)  # fmt: skip


class PromptCacheLLM(AutoMap, CustomLLM):
    """A local model whose prompts are mostly read from a cache.

    Use it wherever LlamaIndex takes an `llm`. Prompt templates and retrieved nodes find their
    cached states by themselves; what was reused for an answer is in its `raw["prompt_cache"]` and
    in `llm.engine.reports`. The model is loaded when it is first needed.

    ```python
    llm = PromptCacheLLM(model="path/or/hub-id", max_tokens=64)
    llm.cache_documents(nodes)                          # optional: encode before the first question
    index.as_query_engine(llm=llm).query("...")
    ```

    `engine=` shares an engine instead of building one. The sampling options and `reuse` may also
    be given for one call.

    Raises: OptionError: an unknown option, a value out of range, or both `engine` and an option
        that it has settled.
    """

    model: str = Field(default="builtin:tiny-rag", description="A built-in model, path or hub id.")
    reuse: str = Field(
        default=DEFAULT_REUSE, description="What is reused: off, exact, fast, balanced or high."
    )
    repair: RepairPolicy | None = Field(
        default=None, description="What balanced and high compute again, if not their own choice."
    )
    store: str = Field(default="memory", description="Where states are kept.")
    storage_dtype: str = Field(
        default="auto", description="How files and servers keep states: auto, bfloat16, int8 …"
    )
    max_tokens: int = Field(default=256, description="Most tokens to generate.")
    temperature: float = Field(default=0.0, description="0 takes the likeliest token.")
    top_p: float = Field(default=1.0, description="Sample from this much probability.")
    top_k: int = Field(default=0, description="Sample from the k likeliest tokens; 0 from all.")
    min_p: float = Field(default=0.0, description="Least probability relative to the likeliest.")
    repetition_penalty: float = Field(default=1.0, description="Above 1 avoids repetition.")
    seed: int | None = Field(default=None, description="Makes sampling repeatable.")
    stop: str | list[str] | None = Field(default=None, description="Strings that end generation.")
    dtype: str = Field(default="auto", description="The model's number format.")
    device: str = Field(default="auto", description="Where the model runs.")
    namespace: str = Field(default="default", description="States are shared only inside of it.")
    context_window: int | None = Field(
        default=None, description="Tokens of prompt and answer; by default the model's.", gt=0
    )
    is_chat_model: bool | None = Field(
        default=None,
        description=(
            "Whether query engines hand over messages. By default whether the model's chat "
            "template marks roles: one that doesn't belongs to a completion model."
        ),
    )

    _lazy: LazyEngine = PrivateAttr()

    def __init__(
        self, model: str | None = None, *, engine: PromptCacheEngine | None = None, **options: Any
    ) -> None:
        check_names(options, type(self).model_fields, "PromptCacheLLM")
        if model is not None:
            options["model"] = model
        if engine is not None:
            options = {**describe_engine(engine, options), **options}
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise OptionError(f"PromptCacheLLM: {error}") from error
        wanted = {name: getattr(self, name) for name in ENGINE_OPTIONS}
        self._lazy = LazyEngine(EngineOptions(**wanted, reuse=self.reuse), engine)
        # A pickle brings the renderer of the object that it was made from.
        if isinstance(options.get("messages_to_prompt"), ChatTemplate | None):
            self.messages_to_prompt = ChatTemplate(self._lazy)
        self._options({})  # A value out of range is refused here, not at the first question.
        install_handlers()

    @classmethod
    def class_name(cls) -> str:
        """The name in traces and serialised indices."""
        return "PromptCacheLLM"

    @property
    def engine(self) -> PromptCacheEngine:
        """The engine behind this LLM. The first use loads the model."""
        return self._lazy.get()

    @property
    def engine_handle(self) -> EngineHandle:
        """How others share the engine before it is built."""
        return self._lazy

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex plans prompts with. Loads the model if any of it is the model's."""
        window, is_chat = self.context_window, self.is_chat_model
        return LLMMetadata(
            context_window=window or self.engine.lm.context_length or DEFAULT_CONTEXT_WINDOW,
            num_output=self.max_tokens,
            is_chat_model=self._lazy.marks_roles if is_chat is None else is_chat,
            model_name=self.model,
        )

    def to_payload(self) -> dict[str, Any]:
        """What traces show of this LLM. Does not load the model for it."""
        if not self._lazy.is_built:
            return {"class_name": self.class_name(), "model_name": self.model}
        return super().to_payload()

    def schema_for(
        self,
        prompt_template: BasePromptTemplate,
        *,
        name: str | None = None,
        lengths: Mapping[str, int] | None = None,
    ) -> str:
        """The PML schema of a prompt template.

        name: of the schema; made of the content when not given. lengths: the most tokens of each
            variable; 64 if not given.
        Raises: TemplateError: no schema can express the template.
        """
        return _schema.schema_for(prompt_template, llm=self, name=name, lengths=lengths)

    def cache_documents(
        self,
        documents: Source | Iterable[BaseNode | NodeWithScore | str],
        progress: bool = True,  # noqa: FBT001, FBT002 (the published signature)
    ) -> EncodeReport:
        """Encode nodes, documents or plain texts before a question needs them.

        documents: a list of them, or an index or a document store, whose nodes are meant.
        Nodes are encoded as query engines write them into prompts: with the metadata meant for
        the model, stripped. What the store has already is not encoded again.

        Raises: OptionError: something else was given. ContextLengthError: one is too long.
        """
        return encode_documents(self.engine, CAPTURE, documents, progress=progress)

    def prune(self, *in_use: Source) -> PruneReport:
        """Drop the states of nodes that are gone: deleted, replaced, or changed.

        in_use: every index that this LLM answers from; or document stores, or lists of nodes. What
            none of them holds is dropped: it costs time again if it is asked for, no more.

        Only texts of nodes are dropped that this LLM, or another on the same engine, was given to
        encode or has answered from, in this process; then in a folder every state of them, whoever
        made it, as equal texts share states. What others put into a shared store is not known here:
        after a restart, `cache_documents(index)` before documents are deleted makes it so.

        Raises: OptionError: nothing was given, or a source that does not say which nodes are in
            use, such as an ingestion pipeline's document store. StoreError: the store's folder
            can't be read, nothing was dropped.
        """
        return prune(self.engine, CAPTURE, in_use)

    def release_doc(self, ref_doc_id: str) -> PruneReport:
        """Drop the states of a document's nodes, except for texts that other documents have too.

        Knows of what `prune` knows; a document that was never met is no error. A document that is
        not cut into nodes has its own id.

        Raises: OptionError: it is no id. StoreError: the store's folder can't be read.
        """
        return release(self.engine, CAPTURE, ref_doc_id)

    @llm_completion_callback()
    def complete(
        self,
        prompt: str,
        formatted: bool = False,  # noqa: FBT001, FBT002 - the base class's signature
        **kwargs: Any,
    ) -> CompletionResponse:
        """Answer a prompt. `formatted` says that nothing is to be put around it."""
        options = self._options(kwargs)
        generation = self.engine.generate(self._text_prompt(prompt, formatted=formatted), *options)
        return responses.completion(generation)

    @llm_completion_callback()
    def stream_complete(
        self,
        prompt: str,
        formatted: bool = False,  # noqa: FBT001, FBT002 - the base class's signature
        **kwargs: Any,
    ) -> CompletionResponseGen:
        """`complete` piece by piece. The prompt is mapped now, the model runs when asked."""
        options = self._options(kwargs)
        chunks = self.engine.stream(self._text_prompt(prompt, formatted=formatted), *options)
        return responses.completions(chunks)

    @llm_completion_callback()
    async def acomplete(
        self,
        prompt: str,
        formatted: bool = False,  # noqa: FBT001, FBT002 - the base class's signature
        **kwargs: Any,
    ) -> CompletionResponse:
        """`complete` without blocking the event loop."""
        options = self._options(kwargs)
        engine = await self._aengine()
        generation = await engine.agenerate(
            self._text_prompt(prompt, formatted=formatted), *options
        )
        return responses.completion(generation)

    @llm_completion_callback()
    async def astream_complete(
        self,
        prompt: str,
        formatted: bool = False,  # noqa: FBT001, FBT002 - the base class's signature
        **kwargs: Any,
    ) -> CompletionResponseAsyncGen:
        """`stream_complete` without blocking the event loop."""
        options = self._options(kwargs)
        engine = await self._aengine()
        chunks = engine.astream(self._text_prompt(prompt, formatted=formatted), *options)
        return responses.acompletions(chunks)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        options = self._options(kwargs)
        generation = self.engine.generate(self._chat_prompt(messages), *options)
        return responses.as_chat(responses.completion(generation))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """`chat` piece by piece. The prompt is mapped now, the model runs when asked."""
        options = self._options(kwargs)
        chunks = self.engine.stream(self._chat_prompt(messages), *options)
        return (responses.as_chat(part) for part in responses.completions(chunks))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` without blocking the event loop."""
        options = self._options(kwargs)
        engine = await self._aengine()
        generation = await engine.agenerate(self._chat_prompt(messages), *options)
        return responses.as_chat(responses.completion(generation))

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """`stream_chat` without blocking the event loop."""
        options = self._options(kwargs)
        engine = await self._aengine()
        chunks = engine.astream(self._chat_prompt(messages), *options)
        return (responses.as_chat(part) async for part in responses.acompletions(chunks))

    async def _aengine(self) -> PromptCacheEngine:
        """The engine; loading its model does not block the event loop."""
        return await asyncio.to_thread(self._lazy.get)

    def _options(self, given: Mapping[str, Any]) -> tuple[SamplingParams, ReuseMode]:
        own = {name: getattr(self, name) for name in _OF_A_CALL}
        return call_options(own, given, "a call of PromptCacheLLM")

    def _text_prompt(self, text: str, *, formatted: bool) -> Prompt:
        if formatted:
            return self._noted(text_prompt(text))
        wrap = self.completion_to_prompt or default_completion_to_prompt
        if self.metadata.is_chat_model and wrap is default_completion_to_prompt:
            # To a chat model, a bare text is what the user says.
            return self._chat_prompt([ChatMessage(role=MessageRole.USER, content=text)])
        return self._noted(wrapped_prompt(text, lambda bare: self._extend_prompt(wrap(bare))))

    def _chat_prompt(self, messages: Sequence[ChatMessage]) -> Prompt:
        system = (MessageRole.SYSTEM, self.system_prompt)
        if all((message.role, message.content) != system for message in messages):
            messages = self._extend_messages(list(messages))
        to_prompt = self.messages_to_prompt or ChatTemplate(self._lazy)
        return self._noted(chat_prompt(self._lazy, messages, self.system_prompt, to_prompt))

    def _noted(self, prompt: Prompt) -> Prompt:
        return note_documents(self.engine, CAPTURE, prompt)
