"""What the LLM for LlamaIndex is made of: options, engine, documents."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from llama_index.core.base.llms.types import LLMMetadata, MessageRole
from llama_index.core.bridge.pydantic import Field
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.schema import BaseNode, NodeWithScore
from llama_index.core.utils import set_global_tokenizer

from pcache_core import EncodeReport
from pcache_core.base_engine import Engine
from pcache_core.errors import ChatTemplateError
from pcache_integrations._engines import EngineHandle, EngineOwner
from pcache_integrations.llama_index import schema
from pcache_integrations.llama_index.messages import ChatTemplate
from pcache_integrations.llama_index.nodes import PruneReport, Source, encode_documents, prune
from pcache_integrations.llama_index.watch import install_handler


class CachedLLM(EngineOwner, FunctionCallingLLM):
    """An LLM of LlamaIndex: options and engine, documents, what prompts are planned with."""

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

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        engine: Engine | None = None,
        **options: Any,
    ) -> None:
        given = {} if model is None else {"model": model}
        super().__init__(engine=engine, **given, **options)
        if options.get("messages_to_prompt") is None:
            self.messages_to_prompt = ChatTemplate(self._settle())
        install_handler()

    @classmethod
    def class_name(cls) -> str:
        """Return the name in traces and serialised indices."""
        return "PromptCacheLLM"

    def _settle(self) -> EngineHandle:
        """Have LlamaIndex render messages by this engine's model, unless it is told how to."""
        handle = super()._settle()
        own = self.messages_to_prompt
        if isinstance(own, ChatTemplate) and own.handle is not handle:
            self.messages_to_prompt = ChatTemplate(handle)
        return handle

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
        own = isinstance(self.messages_to_prompt, ChatTemplate) and self._settle().is_built
        return MessageRole.USER if own and not _takes_system(self.engine) else MessageRole.SYSTEM

    def set_global_tokenizer(self) -> None:
        """Have LlamaIndex count in this model's tokens, instead of in those of GPT-3.5.

        Query engines then don't cut nodes that do fit into the context, and never take too many.
        Node parsers that are made afterwards measure chunks in these tokens, too.
        """
        set_global_tokenizer(Tokenizer(self._settle()))

    def to_payload(self) -> dict[str, Any]:
        """Return what traces show of this LLM. Does not load the model for it."""
        if not self._settle().is_built:
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
