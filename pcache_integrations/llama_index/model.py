"""What the LLM for LlamaIndex is made of: options, engine, documents."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from llama_index.core.base.llms.types import LLMMetadata, MessageRole
from llama_index.core.bridge.pydantic import Field, PrivateAttr, SecretStr, ValidationError
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.schema import BaseNode, NodeWithScore
from llama_index.core.utils import set_global_tokenizer

from pcache_core import EncodeReport, Preamble
from pcache_core.base_engine import Engine
from pcache_core.errors import ChatTemplateError, OptionError
from pcache_core.params import DEFAULT_MODEL, DEFAULT_REUSE
from pcache_integrations._engines import (
    EngineHandle,
    EngineOwner,
    describe_engine,
    engine_options,
)
from pcache_integrations.calls import call_options, check_names
from pcache_integrations.llama_index import schema
from pcache_integrations.llama_index.messages import ChatTemplate
from pcache_integrations.llama_index.nodes import PruneReport, Source, encode_documents, prune
from pcache_integrations.llama_index.watch import install_handler

_OF_A_CALL = (
    "reuse", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed",
    "stop", "speculative",
)  # fmt: skip


class CachedLLM(EngineOwner, FunctionCallingLLM):
    """Options and engine of an LLM.

    The descriptions of the fields say what they are for.

    Raises: OptionError: an unknown option, a value out of range, or both `engine` and an option
        that it has settled.
    """

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
        description="How much balanced and high compute again: an int of tokens, a float share.",
    )
    store: str = Field(default="memory", description="Where states are kept.")
    storage_dtype: str = Field(
        default="auto", description="How files and servers keep states: auto, bfloat16, int8 …"
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the model."
    )
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
    dtype: str = Field(default="auto", description="The model's number format.")
    device: str = Field(default="auto", description="Where the model runs.")
    namespace: str = Field(default="default", description="States are shared only inside of it.")
    base_url: str | None = Field(
        default=None, description="Of a vLLM server that runs the model, see `pcache serve`."
    )
    api_key: SecretStr | None = Field(default=None, description="Of that server.", exclude=True)
    timeout: float | None = Field(default=None, description="Seconds to wait for that server.")
    max_retries: int | None = Field(default=None, description="Of connections to that server.")
    context_window: int | None = Field(
        default=None, description="Tokens of prompt and answer; by default the model's.", gt=0
    )
    chat_template: bool = Field(
        default=True,
        description=(
            "Whether a plain prompt to a chat model is put through its chat template, as what the "
            "user says; one that holds the template's markup never is."
        ),
    )
    is_chat_model: bool | None = Field(
        default=None,
        description=(
            "Whether query engines hand over messages. By default whether the model's chat "
            "template marks roles: one that doesn't belongs to a completion model."
        ),
    )
    is_function_calling_model: bool | None = Field(
        default=None,
        description=(
            "Whether agents call functions by it. By default whether the model's chat template "
            "tells it of tools; others are told in words, if this is True."
        ),
    )

    _handle: EngineHandle = PrivateAttr()

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        engine: Engine | None = None,
        **options: Any,
    ) -> None:
        check_names(options, type(self).model_fields, "PromptCacheLLM")
        if model is not None:
            options["model"] = os.fspath(model) if isinstance(model, os.PathLike) else model
        if engine is not None:
            options = {**describe_engine(engine, options), **options}
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise OptionError(f"PromptCacheLLM: {error}") from error
        self._handle = EngineHandle(engine_options(self), engine)
        # A pickle brings the renderer of the object that it was made from.
        if isinstance(options.get("messages_to_prompt"), ChatTemplate | None):
            self._render_with(self._handle)
        call_options(self._own_options, {}, "PromptCacheLLM")  # refuses a value out of range
        install_handler()

    @property
    def _own_options(self) -> dict[str, Any]:
        """What a call may say otherwise."""
        return {name: getattr(self, name) for name in _OF_A_CALL}

    @classmethod
    def class_name(cls) -> str:
        """Return the name in traces and serialised indices."""
        return "PromptCacheLLM"

    @property
    def engine_handle(self) -> EngineHandle:
        """Return how others share the engine before it is built."""
        return self._settle()

    def _settle(self) -> EngineHandle:
        wanted = engine_options(self)
        if self._handle.options != wanted:
            self._handle = self._handle.for_options(wanted)
            if isinstance(self.messages_to_prompt, ChatTemplate):
                self._render_with(self._handle)
        return self._handle

    def _render_with(self, handle: EngineHandle) -> None:
        """Have LlamaIndex render messages by the chat template of an engine's model."""
        renderer: Any = ChatTemplate(handle)
        self.messages_to_prompt = renderer

    @property
    def metadata(self) -> LLMMetadata:
        """Return what LlamaIndex plans prompts with; loads the model if any of it is its."""
        window, is_chat, calls = (
            self.context_window, self.is_chat_model, self.is_function_calling_model,
        )  # fmt: skip
        return LLMMetadata(
            context_window=window or self.engine.lm.context_length or DEFAULT_CONTEXT_WINDOW,
            num_output=self.max_tokens,
            is_chat_model=self.engine.lm.text.marks_roles() if is_chat is None else is_chat,
            is_function_calling_model=self._calls_functions if calls is None else calls,
            model_name=self.model,
            system_role=self._system_role,
        )

    @property
    def _calls_functions(self) -> bool:
        if self.is_chat_model is False or not isinstance(self.messages_to_prompt, ChatTemplate):
            return False
        return bool(self.engine.lm.tokenizer.chat_template) and self.engine.tool_format.is_native

    @property
    def _system_role(self) -> MessageRole:
        """Return the role of system prompts: the user's if the template refuses them."""
        own = isinstance(self.messages_to_prompt, ChatTemplate) and self.engine_handle.is_built
        return MessageRole.USER if own and not _takes_system(self.engine) else MessageRole.SYSTEM

    def set_global_tokenizer(self) -> None:
        """Have LlamaIndex count in this model's tokens, instead of in those of GPT-3.5.

        Query engines then don't cut nodes that do fit into the context, and never take too many.
        Node parsers that are made afterwards measure chunks in these tokens, too.
        """
        set_global_tokenizer(Tokenizer(self.engine_handle))

    def to_payload(self) -> dict[str, Any]:
        """Return what traces show of this LLM. Does not load the model for it."""
        if not self.engine_handle.is_built:
            return {"class_name": self.class_name(), "model_name": self.model}
        return super().to_payload()

    def schema_for(
        self,
        prompt_template: BasePromptTemplate,
        *,
        name: str | None = None,
        lengths: Mapping[str, int] | None = None,
    ) -> str:
        """Return the PML schema of a prompt template.

        name: of the schema; made of the content when not given. lengths: the most tokens of each
            variable; 64 if not given.
        Raises: TemplateError: no schema can express the template.
        """
        return schema.schema_for(prompt_template, llm=self, name=name, lengths=lengths)

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
        return encode_documents(self.engine, documents, progress=progress)

    def prune(self, *in_use: Source) -> PruneReport:
        """Drop the states of nodes that are gone: deleted, replaced, or changed.

        in_use: every index that this LLM answers from; or document stores, or lists of nodes. What
            none of them holds is dropped: it costs time again if it is asked for, no more.

        Only texts of nodes are dropped that this LLM, or another on the same engine, was given to
        encode or has answered from, in this process; then in a folder every state of them, whoever
        made it, as equal texts share states. What others put into a shared store is not known here:
        after a restart, `cache_documents(index)` before documents are deleted makes it so. To drop
        texts that you know, such as those of one document, use `engine.forget(texts)`.

        Raises: OptionError: nothing was given, or a source that does not say which nodes are in
            use, such as an ingestion pipeline's document store. StoreError: the store's folder
            can't be read, nothing was dropped.
        """
        return prune(self.engine, in_use)


class Tokenizer:
    """Text to token ids with an engine's tokenizer; a pickle of it builds the engine anew."""

    def __init__(self, handle: EngineHandle) -> None:
        self._handle = handle

    def __call__(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        return list(self._handle.get().lm.token_ids(text))


def _takes_system(engine: Engine) -> bool:
    """Whether the model's chat template takes a system message, or there is none to refuse."""
    if not engine.lm.tokenizer.chat_template:
        return True
    chat = [{"role": role, "content": "Hello"} for role in ("system", "user")]
    try:
        return bool(engine.lm.text.apply_chat_template(chat))
    except ChatTemplateError:
        return False
