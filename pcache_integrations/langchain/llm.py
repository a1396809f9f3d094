"""The completion model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult

from pcache_core import Chunk, Prompt, PromptCacheEngine
from pcache_core import Generation as Answer
from pcache_integrations.langchain._model import CachedModel
from pcache_integrations.langchain._provenance import PROVENANCE
from pcache_integrations.langchain._results import generation_info, token_usage


class PromptCacheLLM(CachedModel, BaseLLM):
    """A completion model that computes only what is new in a prompt.

    Takes the place of any LangChain LLM: templates and retrieved documents are recognised, and
    their attention states are reused in whatever order they come.

    ```python
    llm = PromptCacheLLM(model="builtin:tiny-rag", max_tokens=32)
    llm.cache_documents(documents)  # optional: precomputes
    chain = {"context": retriever | format_docs, "question": RunnablePassthrough()} | prompt | llm
    chain.invoke("Where does Ada live?")
    print(llm.engine.reports[-1])  # which parts of the prompt were reused
    ```
    """

    def __init__(self, *, engine: PromptCacheEngine | None = None, **options: Any) -> None:
        """Take the options; for type checkers, which would leave `engine` out."""
        super().__init__(engine=engine, **options)

    @property
    def _llm_type(self) -> str:
        return "prompt-cache"

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        params, reuse = self._call_options(stop, kwargs)
        return self._result(
            [self.engine.generate(_map(text), params, reuse=reuse) for text in prompts]
        )

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        params, reuse = self._call_options(stop, kwargs)
        engine = await self._aengine()
        return self._result(
            [await engine.agenerate(_map(text), params, reuse=reuse) for text in prompts]
        )

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        params, reuse = self._call_options(stop, kwargs)
        for piece in self.engine.stream(_map(prompt), params, reuse=reuse):
            chunk = _chunk(piece)
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        params, reuse = self._call_options(stop, kwargs)
        engine = await self._aengine()
        async for piece in engine.astream(_map(prompt), params, reuse=reuse):
            chunk = _chunk(piece)
            if run_manager:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    def _result(self, answers: Sequence[Answer]) -> LLMResult:
        return LLMResult(
            generations=[
                [
                    Generation(
                        text=answer.text,
                        generation_info=generation_info(answer.finish_reason, answer.report),
                    )
                ]
                for answer in answers
            ],
            llm_output={
                "token_usage": token_usage([answer.report for answer in answers]),
                "model_name": self.model,
            },
        )


def _map(text: str) -> Prompt:
    """The prompt's parts. Special tokens written out in it count: it may be a chat's rendering."""
    return Prompt(PROVENANCE.segments(text, "text"))


def _chunk(piece: Chunk) -> GenerationChunk:
    info = None
    if piece.finish_reason is not None and piece.report is not None:
        info = generation_info(piece.finish_reason, piece.report)
    return GenerationChunk(text=piece.text, generation_info=info)
