"""Objects that a model writes as JSON, streamed while they grow.

LlamaIndex's own program for this streams in its newer versions only.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.program.utils import process_streaming_objects
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.base import SelectorPromptTemplate


def own_copy(template: BasePromptTemplate, llm: Any) -> BasePromptTemplate:
    """The template that is meant; LlamaIndex's programs write into the one they are given."""
    if isinstance(template, SelectorPromptTemplate):
        template = template.select(llm=llm)
    return template.model_copy()


def demanding(template: BasePromptTemplate, output_cls: Any) -> BasePromptTemplate:
    """The template with the class's schema behind its text, as LlamaIndex's programs have it."""
    return template.model_copy(
        update={"output_parser": PydanticOutputParser(output_cls=output_cls)}
    )


def stream_objects(
    llm: FunctionCallingLLM,
    output_cls: Any,
    template: BasePromptTemplate,
    llm_kwargs: Mapping[str, Any],
    values: Mapping[str, Any],
) -> Generator[Any, None, None]:
    """The object as far as it is written, after every piece; the last one is whole."""
    growing = _Growing(llm, output_cls)
    template = demanding(template, output_cls)
    if llm.metadata.is_chat_model:
        messages = llm._extend_messages(template.format_messages(llm=llm, **values))
        for response in llm.stream_chat(messages, **llm_kwargs):
            yield growing.next(response)
    else:
        for part in llm.stream_complete(template.format(llm=llm, **values), **llm_kwargs):
            yield growing.next(_as_chat(part))


async def astream_objects(
    llm: FunctionCallingLLM,
    output_cls: Any,
    template: BasePromptTemplate,
    llm_kwargs: Mapping[str, Any],
    values: Mapping[str, Any],
) -> AsyncGenerator[Any, None]:
    """As `stream_objects`."""
    growing = _Growing(llm, output_cls)
    template = demanding(template, output_cls)
    if llm.metadata.is_chat_model:
        messages = llm._extend_messages(template.format_messages(llm=llm, **values))
        async for response in await llm.astream_chat(messages, **llm_kwargs):
            yield growing.next(response)
    else:
        text = template.format(llm=llm, **values)
        async for part in await llm.astream_complete(text, **llm_kwargs):
            yield growing.next(_as_chat(part))


class _Growing:
    """What an answer's pieces make of an object."""

    def __init__(self, llm: FunctionCallingLLM, output_cls: Any) -> None:
        self._llm = llm
        self._output_cls = output_cls
        self._seen: list[Any] | None = None

    def next(self, response: ChatResponse) -> Any:
        found = process_streaming_objects(
            response, self._output_cls, cur_objects=self._seen, llm=self._llm
        )
        self._seen = [found]
        return found


def _as_chat(part: CompletionResponse) -> ChatResponse:
    return ChatResponse(message=ChatMessage(part.text, role="assistant"))
