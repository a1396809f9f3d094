"""The methods of an LLM that still see template and arguments apart: each plans, then goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Generator, Mapping
from typing import TYPE_CHECKING, Any

from llama_index.core.llms.llm import LLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.types import TokenAsyncGen, TokenGen

from pcache_integrations.llama_index._capture import CAPTURE
from pcache_integrations.llama_index._shadow import shadow

_logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = LLM
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
        self._plan(prompt, prompt_args, output_cls)
        return super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

    async def astructured_predict(
        self,
        output_cls: Any,
        prompt: Any,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        """As the base class."""
        await asyncio.to_thread(self._plan, prompt, prompt_args, output_cls)
        return await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

    def stream_structured_predict(
        self,
        output_cls: Any,
        prompt: Any,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        """As the base class."""
        self._plan(prompt, prompt_args, output_cls)
        return super().stream_structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

    async def astream_structured_predict(
        self,
        output_cls: Any,
        prompt: Any,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        """As the base class."""
        await asyncio.to_thread(self._plan, prompt, prompt_args, output_cls)
        return await super().astream_structured_predict(
            output_cls, prompt, llm_kwargs, **prompt_args
        )

    def _plan(self, template: Any, args: Mapping[str, Any], output_cls: Any = None) -> None:
        """Remember how the coming prompt is made up. Whatever fails here costs reuse, no more."""
        try:
            for plan in shadow(self, template, args, output_cls):
                CAPTURE.add_plan(plan)
        except Exception:
            _logger.debug("could not plan %s", type(template).__name__, exc_info=True)
