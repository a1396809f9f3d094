"""The methods of an LLM that still see template and arguments apart: each plans, then goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Generator, Mapping
from typing import TYPE_CHECKING, Any

from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.types import PydanticProgramMode, TokenAsyncGen, TokenGen

from pcache_integrations.llama_index._capture import CAPTURE
from pcache_integrations.llama_index._formats import format_of
from pcache_integrations.llama_index._objects import astream_objects, own_copy, stream_objects
from pcache_integrations.llama_index._shadow import shadow

_logger = logging.getLogger(__name__)
# Programs that have the model write the object, instead of calling a function with it.
_WRITTEN = (PydanticProgramMode.DEFAULT, PydanticProgramMode.LLM)

if TYPE_CHECKING:
    from pcache_integrations.llama_index._model import CachedLLM as _Base
else:
    _Base = object


class AutoMap(_Base):
    """A mixin that comes before the LLM class among the bases.

    It is a plain class: methods overridden in an LLM itself are traced twice by LlamaIndex. Plans
    of the asynchronous methods are made in a worker thread, as the first one loads the model.
    """

    def predict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """As the base class."""
        self._plan(prompt, prompt_args)
        return super().predict(prompt, **prompt_args)

    async def apredict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """As the base class."""
        await asyncio.to_thread(self._plan, prompt, prompt_args)
        return await super().apredict(prompt, **prompt_args)

    def stream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenGen:
        """As the base class."""
        self._plan(prompt, prompt_args)
        return super().stream(prompt, **prompt_args)

    async def astream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenAsyncGen:
        """As the base class."""
        await asyncio.to_thread(self._plan, prompt, prompt_args)
        return await super().astream(prompt, **prompt_args)

    def structured_predict(
        self,
        output_cls: Any,
        prompt: Any,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        """As the base class."""
        llm, prompt, kwargs = self._prepare(output_cls, prompt, llm_kwargs, prompt_args)
        return super(AutoMap, llm).structured_predict(output_cls, prompt, kwargs, **prompt_args)

    async def astructured_predict(
        self,
        output_cls: Any,
        prompt: Any,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        """As the base class."""
        llm, prompt, kwargs = await asyncio.to_thread(
            self._prepare, output_cls, prompt, llm_kwargs, prompt_args
        )
        return await super(AutoMap, llm).astructured_predict(
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
        llm, prompt, kwargs = self._prepare(output_cls, prompt, llm_kwargs, prompt_args)
        return super(AutoMap, llm).stream_structured_predict(
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
        llm, prompt, kwargs = await asyncio.to_thread(
            self._prepare, output_cls, prompt, llm_kwargs, prompt_args
        )
        return await super(AutoMap, llm).astream_structured_predict(
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
        return stream_objects(self, output_cls, prompt, llm_kwargs or {}, prompt_args)

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
        return astream_objects(self, output_cls, prompt, llm_kwargs or {}, prompt_args)

    def _prepare(
        self,
        output_cls: Any,
        template: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None,
        args: Mapping[str, Any],
    ) -> tuple[AutoMap, BasePromptTemplate, dict[str, Any]]:
        """The LLM that predicts objects, from which template, and what its calls are to be given.

        Unless another way was chosen, the model writes the object itself: decoding is constrained
        to its schema, and streams show it grow, as they can't show a function's argument.
        """
        llm, kwargs = self, dict(llm_kwargs or {})
        if self.pydantic_program_mode in _WRITTEN:
            llm = self.model_copy(update={"pydantic_program_mode": PydanticProgramMode.LLM})
            kwargs = {"response_format": format_of(output_cls), **kwargs}
        template = own_copy(template, llm)
        llm._plan(template, args, output_cls)
        return llm, template, kwargs

    def _plan(self, template: Any, args: Mapping[str, Any], output_cls: Any = None) -> None:
        """Remember how the coming prompt is made up. Whatever fails here costs reuse, no more."""
        written = output_cls if self.pydantic_program_mode in _WRITTEN else None
        try:
            for plan in shadow(self, template, args, written):
                CAPTURE.add_plan(plan)
        except Exception:
            _logger.debug("could not plan %s", type(template).__name__, exc_info=True)
