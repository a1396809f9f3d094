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
from llama_index.core.types import PydanticProgramMode, TokenAsyncGen, TokenGen

from pcache_integrations.calls import format_of
from pcache_integrations.llama_index.schema import selected
from pcache_integrations.llama_index.templates import tell, telling

# Programs that have the model write the object, instead of calling a function with it.
_WRITTEN = (PydanticProgramMode.DEFAULT, PydanticProgramMode.LLM)

if TYPE_CHECKING:
    from pcache_integrations.llama_index.model import CachedLLM as _Base
else:
    _Base = object


class Predicts(_Base):
    """A mixin that comes before the LLM class among the bases.

    It is a plain class: methods overridden in an LLM itself are traced twice by LlamaIndex. The
    asynchronous methods read templates in a worker thread, as the first one loads the model.
    """

    def predict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """Do as the base class does."""
        with telling(tell(self, prompt, prompt_args)):
            return super().predict(prompt, **prompt_args)

    async def apredict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """Do as the base class does."""
        with telling(await asyncio.to_thread(tell, self, prompt, prompt_args)):
            return await super().apredict(prompt, **prompt_args)

    def stream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenGen:
        """Do as the base class does."""
        with telling(tell(self, prompt, prompt_args)):
            return super().stream(prompt, **prompt_args)

    async def astream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenAsyncGen:
        """Do as the base class does."""
        with telling(await asyncio.to_thread(tell, self, prompt, prompt_args)):
            return await super().astream(prompt, **prompt_args)

    def structured_predict(
        self,
        output_cls: Any,
        prompt: Any,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        """Do as the base class does."""
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
        """Do as the base class does."""
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
        """Do as the base class does."""
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
        """Do as the base class does."""
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
        """Return the LLM that predicts objects, its template, and what its calls are given.

        Unless another way was chosen, the model writes the object itself: decoding is constrained
        to its schema, and streams show it grow, as they can't show a function's argument. The
        template is a copy, as LlamaIndex's programs write into the one they are given.
        """
        llm, kwargs = self, dict(llm_kwargs or {})
        if self.pydantic_program_mode in _WRITTEN:
            llm = self.model_copy(update={"pydantic_program_mode": PydanticProgramMode.LLM})
            kwargs = {"response_format": response_format(output_cls), **kwargs}
        return llm, selected(template, llm).model_copy(), kwargs


def response_format(output_cls: Any) -> dict[str, Any]:
    """Return a `response_format` whose answers are objects of a pydantic class."""
    return format_of(output_cls.__name__, output_cls.model_json_schema())


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
    asked = growing.asked(template, values)
    stream: Any = llm.stream_complete if isinstance(asked, str) else llm.stream_chat
    with telling(told):
        parts = stream(asked, **llm_kwargs)
    for part in parts:
        yield growing.next(part)


async def _astream_objects(
    llm: FunctionCallingLLM,
    output_cls: Any,
    template: BasePromptTemplate,
    llm_kwargs: Mapping[str, Any],
    values: Mapping[str, Any],
) -> AsyncGenerator[Any, None]:
    """Yield as `_stream_objects` does."""
    growing = _Growing(llm, output_cls)
    told = await asyncio.to_thread(tell, llm, template, values, output_cls)
    asked = growing.asked(template, values)
    stream: Any = llm.astream_complete if isinstance(asked, str) else llm.astream_chat
    with telling(told):
        parts = await stream(asked, **llm_kwargs)
    async for part in parts:
        yield growing.next(part)


class _Growing:
    """What an answer's pieces make of an object."""

    def __init__(self, llm: FunctionCallingLLM, output_cls: Any) -> None:
        self._llm = llm
        self._output_cls = output_cls
        self._seen: list[Any] | None = None

    def asked(
        self, template: BasePromptTemplate, values: Mapping[str, Any]
    ) -> str | list[ChatMessage]:
        """Format the template with the class's schema after it, as LlamaIndex's programs do."""
        parser = PydanticOutputParser(output_cls=self._output_cls)
        template = template.model_copy(update={"output_parser": parser})
        if not self._llm.metadata.is_chat_model:
            return template.format(llm=self._llm, **values)
        return self._llm._extend_messages(template.format_messages(llm=self._llm, **values))

    def next(self, part: ChatResponse | CompletionResponse) -> Any:
        """Return the object as far as it is written."""
        if isinstance(part, CompletionResponse):
            part = ChatResponse(message=ChatMessage(part.text, role="assistant"))
        found = process_streaming_objects(
            part, self._output_cls, cur_objects=self._seen, llm=self._llm
        )
        self._seen = [found]
        return found
