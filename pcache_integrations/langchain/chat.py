"""The chat model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from pcache_core import Chunk, Generation, PromptCacheEngine, SamplingParams
from pcache_core.params import ReuseMode
from pcache_integrations.langchain._messages import chat_prompt
from pcache_integrations.langchain._model import CachedModel
from pcache_integrations.langchain._results import generation_info, usage_metadata


class ChatPromptCache(CachedModel, BaseChatModel):
    """A chat model that computes only what is new in a conversation.

    Messages are rendered by the model's own chat template. What a prompt template wrote is
    template text; everything else in a message is plain data, and can't forge a role's mark.
    How much was reused: `message.usage_metadata["input_token_details"]["cache_read"]`, and
    `message.response_metadata["prompt_cache"]`.

    streaming: as in every LangChain chat model, whether `invoke` streams inside.
    """

    streaming: bool = False

    def __init__(self, *, engine: PromptCacheEngine | None = None, **options: Any) -> None:
        """Take the options; for type checkers, which would leave `engine` out."""
        super().__init__(engine=engine, **options)

    @property
    def _llm_type(self) -> str:
        return "chat-prompt-cache"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        params, reuse = self._call_options(stop, kwargs)
        prompt = chat_prompt(self.engine, messages)
        return self._result(self.engine.generate(prompt, params, reuse=reuse))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        params, reuse = self._call_options(stop, kwargs)
        engine = await self._aengine()
        prompt = chat_prompt(engine, messages)
        return self._result(await engine.agenerate(prompt, params, reuse=reuse))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        params, reuse = self._call_options(stop, kwargs)
        prompt = chat_prompt(self.engine, messages)
        for piece in self.engine.stream(prompt, params, reuse=reuse):
            chunk = self._chunk(piece)
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        params, reuse = self._call_options(stop, kwargs)
        engine = await self._aengine()
        prompt = chat_prompt(engine, messages)
        async for piece in engine.astream(prompt, params, reuse=reuse):
            chunk = self._chunk(piece)
            if run_manager:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    def _call_options(
        self, stop: list[str] | None, given: Mapping[str, Any]
    ) -> tuple[SamplingParams, ReuseMode]:
        # LangChain passes `stream=` on after acting upon it.
        meant = {name: value for name, value in given.items() if name != "stream"}
        return super()._call_options(stop, meant)

    def _result(self, answer: Generation) -> ChatResult:
        message = AIMessage(
            content=answer.text,
            usage_metadata=usage_metadata(answer.report),
            response_metadata={
                "model_name": self.model,
                **generation_info(answer.finish_reason, answer.report),
            },
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _chunk(self, piece: Chunk) -> ChatGenerationChunk:
        """A piece of the answer. Counts and names come once, as chunks are added up."""
        message = AIMessageChunk(content=piece.text)
        if piece.finish_reason is not None and piece.report is not None:
            message = AIMessageChunk(
                content=piece.text,
                chunk_position="last",
                usage_metadata=usage_metadata(piece.report),
                response_metadata={
                    "model_name": self.model,
                    **generation_info(piece.finish_reason, piece.report),
                },
            )
        return ChatGenerationChunk(message=message)
