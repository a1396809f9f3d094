"""The methods of an LLM that are handed a template and its values, and answers that are objects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Mapping
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.program.utils import process_streaming_objects
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.base import SelectorPromptTemplate
from llama_index.core.types import PydanticProgramMode, TokenAsyncGen, TokenGen

from pcache_integrations.llama_index._calls import format_of
from pcache_integrations.llama_index._mapping import tell, telling

# Programs that have the model write the object, instead of calling a function with it.
_WRITTEN = (PydanticProgramMode.DEFAULT, PydanticProgramMode.LLM)

if TYPE_CHECKING:
    from pcache_integrations.llama_index._model import CachedLLM as _Base
else:
    _Base = object


class Predicts(_Base):
    """A mixin that comes before the LLM class among the bases.

    It is a plain class: methods overridden in an LLM itself are traced twice by LlamaIndex. The
    asynchronous methods read templates in a worker thread, as the first one loads the model.
    """

    def predict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """As the base class."""
        with telling(tell(self, prompt, prompt_args)):
            return super().predict(prompt, **prompt_args)

    async def apredict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """As the base class."""
        with telling(await asyncio.to_thread(tell, self, prompt, prompt_args)):
            return await super().apredict(prompt, **prompt_args)

    def stream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenGen:
        """As the base class."""
        with telling(tell(self, prompt, prompt_args)):
            return super().stream(prompt, **prompt_args)

    async def astream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenAsyncGen:
        """As the base class."""
        with telling(await asyncio.to_thread(tell, self, prompt, prompt_args)):
            return await super().astream(prompt, **prompt_args)

    def structured_predict(
        self,
        output_cls: Any,
        prompt: Any,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        """As the base class."""
        llm, prompt, kwargs = self._prepare(output_cls, prompt, llm_kwargs)
        with telling(tell(llm, prompt, prompt_args, output_cls)):
            return super(Predicts, llm).structured_predict(
                output_cls, prompt, kwargs, **prompt_args
            )

    async def astructured_predict(
        self,
        output_cls: Any,
        prompt: Any,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        """As the base class."""
        llm, prompt, kwargs = await asyncio.to_thread(self._prepare, output_cls, prompt, llm_kwargs)
        told = await asyncio.to_thread(tell, llm, prompt, prompt_args, output_cls)
        with telling(told):
            return await super(Predicts, llm).astructured_predict(
                output_cls, prompt, kwargs, **prompt_args
            )

    def stream_structured_predict(
        self,
        output_cls: Any,
        prompt: Any,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        """As the base class."""
        llm, prompt, kwargs = self._prepare(output_cls, prompt, llm_kwargs)
        return super(Predicts, llm).stream_structured_predict(
            output_cls, prompt, kwargs, **prompt_args
        )

    async def astream_structured_predict(
        self,
        output_cls: Any,
        prompt: Any,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        """As the base class."""
        llm, prompt, kwargs = await asyncio.to_thread(self._prepare, output_cls, prompt, llm_kwargs)
        return await super(Predicts, llm).astream_structured_predict(
            output_cls, prompt, kwargs, **prompt_args
        )

    def _structured_stream_call(
        self,
        output_cls: Any,
        prompt: Any,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        if self.pydantic_program_mode not in _WRITTEN:
            return super()._structured_stream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        return _stream_objects(self, output_cls, prompt, llm_kwargs or {}, prompt_args)

    async def _structured_astream_call(
        self,
        output_cls: Any,
        prompt: Any,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        if self.pydantic_program_mode not in _WRITTEN:
            return await super()._structured_astream_call(
                output_cls, prompt, llm_kwargs, **prompt_args
            )
        return _astream_objects(self, output_cls, prompt, llm_kwargs or {}, prompt_args)

    def _prepare(
        self, output_cls: Any, template: BasePromptTemplate, llm_kwargs: dict[str, Any] | None
    ) -> tuple[Predicts, BasePromptTemplate, dict[str, Any]]:
        """The LLM that predicts objects, from which template, and what its calls are to be given.

        Unless another way was chosen, the model writes the object itself: decoding is constrained
        to its schema, and streams show it grow, as they can't show a function's argument. The
        template is a copy, as LlamaIndex's programs write into the one they are given.
        """
        llm, kwargs = self, dict(llm_kwargs or {})
        if self.pydantic_program_mode in _WRITTEN:
            llm = self.model_copy(update={"pydantic_program_mode": PydanticProgramMode.LLM})
            kwargs = {"response_format": format_of(output_cls), **kwargs}
        if isinstance(template, SelectorPromptTemplate):
            template = template.select(llm=llm)
        return llm, template.model_copy(), kwargs


def _stream_objects(
    llm: FunctionCallingLLM,
    output_cls: Any,
    template: BasePromptTemplate,
    llm_kwargs: Mapping[str, Any],
    values: Mapping[str, Any],
) -> Generator[Any, None, None]:
    """Yield the object as far as it is written, after every piece; the last one is whole.

    LlamaIndex's own program for this streams in its newer versions only.
    """
    growing = _Growing(llm, output_cls)
    told = tell(llm, template, values, output_cls)
    template = _demanding(template, output_cls)
    if llm.metadata.is_chat_model:
        messages = llm._extend_messages(template.format_messages(llm=llm, **values))
        with telling(told):
            responses = llm.stream_chat(messages, **llm_kwargs)
        for response in responses:
            yield growing.next(response)
    else:
        text = template.format(llm=llm, **values)
        with telling(told):
            parts = llm.stream_complete(text, **llm_kwargs)
        for part in parts:
            yield growing.next(_as_chat(part))


async def _astream_objects(
    llm: FunctionCallingLLM,
    output_cls: Any,
    template: BasePromptTemplate,
    llm_kwargs: Mapping[str, Any],
    values: Mapping[str, Any],
) -> AsyncGenerator[Any, None]:
    """As `_stream_objects`."""
    growing = _Growing(llm, output_cls)
    told = await asyncio.to_thread(tell, llm, template, values, output_cls)
    template = _demanding(template, output_cls)
    if llm.metadata.is_chat_model:
        messages = llm._extend_messages(template.format_messages(llm=llm, **values))
        with telling(told):
            responses = await llm.astream_chat(messages, **llm_kwargs)
        async for response in responses:
            yield growing.next(response)
    else:
        text = template.format(llm=llm, **values)
        with telling(told):
            parts = await llm.astream_complete(text, **llm_kwargs)
        async for part in parts:
            yield growing.next(_as_chat(part))


def _demanding(template: BasePromptTemplate, output_cls: Any) -> BasePromptTemplate:
    """The template with the class's schema after its text, as LlamaIndex's programs have it."""
    return template.model_copy(
        update={"output_parser": PydanticOutputParser(output_cls=output_cls)}
    )


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
