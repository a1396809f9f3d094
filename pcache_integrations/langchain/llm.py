"""The completion model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
    Callbacks,
)
from langchain_core.language_models.base import LanguageModelInput
from langchain_core.language_models.llms import BaseLLM
from langchain_core.messages import BaseMessage, get_buffer_string
from langchain_core.outputs import GenerationChunk, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig
from pydantic import PrivateAttr

from pcache_core import Generation, Message, Prompt
from pcache_core.base_engine import Engine
from pcache_integrations.calls import Call, usage
from pcache_integrations.documents import as_data, holds_markup
from pcache_integrations.langchain.model import CachedModel, standard_errors
from pcache_integrations.langchain.results import TextAnswer
from pcache_integrations.langchain.watch import WATCHER

_OF_A_RUN = ("tags", "metadata", "run_name", "run_id")
# Of one call; the engine decides how many of them run in one forward.
_MAX_PROMPTS_AT_ONCE = 64


class PromptCacheLLM(CachedModel, BaseLLM):
    """A completion model that computes only what is new in a prompt.

    Takes the place of any LangChain LLM: templates and retrieved documents are recognised, and
    their attention states are reused in whatever order they come.

    Setup:
        `pip install pcache-integrations`. No server and no key: the model runs in this process,
        or, with `base_url`, on a vLLM server that `pcache serve` starts.

    Key init args, completion:
        model: a directory, a hub id, a `.gguf` file, `ollama:NAME`; by default a small chat model.
        chat_template: whether a plain prompt is put through the model's chat template, as one
            message of the user; one that holds the template's markup never is.
        max_tokens: most tokens of an answer.
        temperature, top_p, top_k, min_p, repetition_penalty, seed, stop, speculative: as in
            `SamplingParams`.

    Key init args, cache:
        reuse: `off`, `exact`, `fast`, `balanced` or `high`.
        store: `memory`, a folder, `redis://…` or an object store's URL.
        namespace: states are shared within one only.

    Instantiate:
        ```python
        from pcache_integrations.langchain import PromptCacheLLM, track

        llm = PromptCacheLLM(model="builtin:tiny-rag", max_tokens=32)
        ```

    Invoke:
        ```python
        chain = {"context": retriever | format_docs, "question": RunnablePassthrough()} | prompt | llm
        chain.invoke("Where does Ada live?")
        print(llm.engine.reports[-1])  # which parts of the prompt were reused
        ```

    Stream:
        ```python
        for piece in chain.stream("Where does Ada live?"):
            print(piece, end="")
        ```

    Async:
        ```python
        await chain.ainvoke("Where does Ada live?")
        await chain.abatch(["Where does Ada live?", "Who employs her?"])  # run together
        ```

    Documents:
        ```python
        llm.cache_documents(documents)  # optional: precomputes
        vector_store = track(vector_store)  # if searched without a retriever
        ```

    Token usage and logprobs:
        ```python
        result = llm.generate([text], logprobs=2)
        result.llm_output["token_usage"]
        result.generations[0][0].generation_info["prompt_cache"]
        result.generations[0][0].generation_info["logprobs"]  # as OpenAI's completions have them
        ```
    """  # noqa: E501 (the chain is the one of LangChain's tutorials, in a line)

    chat_template: bool = True

    _call_asks: dict[str, Any] = PrivateAttr(default_factory=dict)

    def __init__(self, *, engine: Engine | None = None, **options: Any) -> None:
        """Take the options; for type checkers, which would leave `engine` out."""
        super().__init__(engine=engine, **options)

    @property
    def _llm_type(self) -> str:
        return "prompt-cache"

    def generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Generate as any LLM does; response caches tell calls of different options apart."""
        return super(PromptCacheLLM, self._asked(kwargs)).generate(
            prompts, stop, callbacks, **kwargs
        )

    async def agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Generate as `generate` does."""
        return await super(PromptCacheLLM, self._asked(kwargs)).agenerate(
            prompts, stop, callbacks, **kwargs
        )

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Count the tokens of the prompt that these messages are as text; there are no tools."""
        if not messages or self.custom_get_token_ids is not None or tools:
            return super().get_num_tokens_from_messages(messages, tools)
        return self._count(self._prompt(get_buffer_string(messages)))

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Answer as any LLM does; with `return_exceptions`, bad prompts cost others nothing."""
        if return_exceptions:
            return Runnable.batch(self, inputs, config, return_exceptions=True, **kwargs)
        return super().batch(inputs, config, **kwargs)

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Answer as `batch` does."""
        if return_exceptions:
            return await Runnable.abatch(self, inputs, config, return_exceptions=True, **kwargs)
        return await super().abatch(inputs, config, **kwargs)

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        with standard_errors():
            params, reuse = self._call_options(stop, kwargs)
            mapped = self._map(prompts)
            if len(mapped) < 2:
                answers = [self.engine.generate(prompt, params, reuse) for prompt in mapped]
                return self._result(answers)
            generate = self.engine.generate
            pool = ThreadPoolExecutor(min(len(mapped), _MAX_PROMPTS_AT_ONCE), "pcache-batch")
            try:
                jobs = [pool.submit(generate, prompt, params, reuse) for prompt in mapped]
                return self._result([job.result() for job in jobs])
            finally:
                pool.shutdown(cancel_futures=True)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        with standard_errors():
            params, reuse = self._call_options(stop, kwargs)
            mapped = await asyncio.to_thread(self._map, prompts)
            answers = (self.engine.agenerate(prompt, params, reuse) for prompt in mapped)
            jobs = [asyncio.ensure_future(answer) for answer in answers]
            try:
                return self._result(await asyncio.gather(*jobs))
            finally:
                for job in jobs:
                    job.cancel()

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        return self._pieces(partial(self._call, prompt, stop, kwargs), run_manager)

    def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        return self._apieces(partial(self._call, prompt, stop, kwargs), run_manager)

    def _call(
        self, text: str, stop: list[str] | None, given: Mapping[str, Any]
    ) -> tuple[Prompt, Call]:
        call = Call(*self._call_options(stop, given))
        return self._prompt(text), call

    def _answer(self, call: Call) -> TextAnswer:
        return TextAnswer()

    def _asked(self, given: Mapping[str, Any]) -> PromptCacheLLM:
        """Return a copy that knows what a call asks for: LangChain's cache keys leave it out."""
        asked = {name: value for name, value in given.items() if name not in _OF_A_RUN}
        copy = self.model_copy()
        copy._call_asks = {name: value for name, value in asked.items() if value is not None}
        return copy

    def _map(self, texts: Sequence[str]) -> list[Prompt]:
        return [self._prompt(text) for text in texts]

    def _prompt(self, text: str) -> Prompt:
        """Return the prompt in parts, in a user's turn of the chat template if that is wanted."""
        segments = WATCHER.segments(text, "text")
        text_of_model = self.engine.lm.text
        wanted = self.chat_template and segments and text_of_model.marks_roles()
        if not wanted or holds_markup(text_of_model, segments):
            # Special tokens written out count: it may be a chat's rendering.
            return Prompt(segments)
        return self.engine.prompt_from_chat([Message("user", as_data(text_of_model, segments))])

    @property
    def _identifying_params(self) -> dict[str, Any]:
        own = {**super()._identifying_params, "chat_template": self.chat_template}
        return {**own, **self._call_asks}

    def _result(self, answers: Sequence[Generation]) -> LLMResult:
        return LLMResult(
            generations=[[TextAnswer().whole(answer)] for answer in answers],
            llm_output={
                "token_usage": usage([answer.report for answer in answers]),
                "model_name": self.model,
            },
        )
