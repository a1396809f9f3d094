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
        llm, kwargs = self._structured(output_cls, llm_kwargs)
        llm._plan(prompt, prompt_args, output_cls)
        return super(AutoMap, llm).structured_predict(output_cls, prompt, kwargs, **prompt_args)

    async def astructured_predict(
        self,
        output_cls: Any,
        prompt: Any,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        """As the base class."""
        llm, kwargs = self._structured(output_cls, llm_kwargs)
        await asyncio.to_thread(llm._plan, prompt, prompt_args, output_cls)
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
        llm, kwargs = self._structured(output_cls, llm_kwargs)
        llm._plan(prompt, prompt_args, output_cls)
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
        llm, kwargs = self._structured(output_cls, llm_kwargs)
        await asyncio.to_thread(llm._plan, prompt, prompt_args, output_cls)
        return await super(AutoMap, llm).astream_structured_predict(
            output_cls, prompt, kwargs, **prompt_args
        )

    def _structured(
        self, output_cls: Any, llm_kwargs: dict[str, Any] | None
    ) -> tuple[AutoMap, dict[str, Any]]:
        """The LLM that predicts objects, and what its calls are to be given.

        Unless another way was chosen, the model writes the object itself: decoding is constrained
        to its schema, and streams show it grow, as they can't show a function's argument.
        """
        chosen = self.pydantic_program_mode
        if chosen not in _WRITTEN:
            return self, dict(llm_kwargs or {})
        writer = self.model_copy(update={"pydantic_program_mode": PydanticProgramMode.LLM})
        return writer, {"response_format": format_of(output_cls), **(llm_kwargs or {})}

    def _plan(self, template: Any, args: Mapping[str, Any], output_cls: Any = None) -> None:
        """Remember how the coming prompt is made up. Whatever fails here costs reuse, no more."""
        written = output_cls if self.pydantic_program_mode in _WRITTEN else None
        try:
            for plan in shadow(self, template, args, written):
                CAPTURE.add_plan(plan)
        except Exception:
            _logger.debug("could not plan %s", type(template).__name__, exc_info=True)
