"""An LLM for LlamaIndex that reuses the attention states of what prompts have in common."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    MessageRole,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import ToolSelection, default_completion_to_prompt
from llama_index.core.tools import BaseTool

from pcache_core import Chunk, Prompt, Tool
from pcache_core.errors import AnswerError
from pcache_integrations._engines import Engine
from pcache_integrations._mapping import holds_markup
from pcache_integrations.llama_index._calls import Call, CallOptions
from pcache_integrations.llama_index._documents import note_documents
from pcache_integrations.llama_index._mapping import segments_of
from pcache_integrations.llama_index._model import CachedLLM
from pcache_integrations.llama_index._predict import Predicts
from pcache_integrations.llama_index._prompts import (
    ChatTemplate,
    chat_prompt,
    text_prompt,
    wrapped_prompt,
)
from pcache_integrations.llama_index._tools import as_openai, selections

_R = TypeVar("_R")


class PromptCacheLLM(Predicts, CachedLLM):
    """A local model whose prompts are mostly read from a cache.

    Use it wherever LlamaIndex takes an `llm`. Prompt templates and retrieved nodes find their
    cached states by themselves; what was reused for an answer is in its `raw["prompt_cache"]` and
    in `llm.engine.reports`, and is counted in `raw["usage"]` in OpenAI's shape. The model is loaded
    when it is first needed, once for all objects of equal options.

    >>> from llama_index.core import SummaryIndex, PromptTemplate
    >>> from llama_index.core.schema import TextNode
    >>> from pcache_integrations.llama_index import PromptCacheLLM
    >>> llm = PromptCacheLLM(model="builtin:tiny-rag", max_tokens=48)
    >>> llm.set_global_tokenizer()
    >>> fact = "Ann Ostenfurt was born in Nadbridge in 1931 and worked there as a glazier."
    >>> index = SummaryIndex([TextNode(text=fact, id_="d1")])
    >>> llm.cache_documents(index, progress=False).encoded
    1
    >>> answer = index.as_query_engine(llm=llm).query("Where was Ann Ostenfurt born?")
    >>> [part.name for part in llm.engine.reports[-1].segments if part.kind == "document"]
    ['d1']

    Calls: `complete`, `chat`, their streams and the asynchronous twins of all four, which don't
    block the event loop. Sampling options, `stop`, `reuse`, `response_format`, `logprobs` with
    `top_logprobs`, and for chats `tools`, `tool_choice` and `parallel_tool_calls` hold for one
    call. Other providers' hints about caching are accepted and have no effect, but a `CachePoint`
    in a message, or `additional_kwargs["cache_control"]`, makes modules of the texts it marks.

    Tools and structured answers are valid by construction, whatever the model: decoding is
    constrained to the tool's schema where a call is demanded, and to the class's in structured
    prediction.

    >>> from pydantic import BaseModel
    >>> class Person(BaseModel):
    ...     name: str
    ...     year: int
    >>> question = PromptTemplate("{fact} Who, and when?")
    >>> type(llm.structured_predict(Person, question, fact=fact)).__name__
    'Person'

    `engine=` shares an engine instead of building one; `base_url=` names a vLLM server that runs
    the model, started by `pcache serve`.

    Raises: OptionError: an unknown option, a value out of range, or both `engine` and an option
        that it has settled.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        engine: Engine | None = None,
        **options: Any,
    ) -> None:
        """Take the options; for type checkers, which would leave `engine` out."""
        CachedLLM.__init__(self, model, engine=engine, **options)

    @llm_completion_callback()
    def complete(
        self,
        prompt: str,
        formatted: bool = False,  # noqa: FBT001, FBT002 - the base class's signature
        **kwargs: Any,
    ) -> CompletionResponse:
        """Answer a prompt. `formatted` says that nothing is to be put around it."""
        call = self._completion_call(prompt, kwargs, formatted=formatted)
        generation = self.engine.generate(call.prompt, call.params, reuse=call.reuse)
        return call.completion().whole(generation)

    @llm_completion_callback()
    def stream_complete(
        self,
        prompt: str,
        formatted: bool = False,  # noqa: FBT001, FBT002 - the base class's signature
        **kwargs: Any,
    ) -> CompletionResponseGen:
        """`complete` piece by piece. The prompt is mapped now, the model runs when asked."""
        call = self._completion_call(prompt, kwargs, formatted=formatted)
        return self._pieces(call, call.completion().piece)

    @llm_completion_callback()
    async def acomplete(
        self,
        prompt: str,
        formatted: bool = False,  # noqa: FBT001, FBT002 - the base class's signature
        **kwargs: Any,
    ) -> CompletionResponse:
        """`complete` without blocking the event loop."""
        call = await asyncio.to_thread(self._completion_call, prompt, kwargs, formatted=formatted)
        generation = await self.engine.agenerate(call.prompt, call.params, reuse=call.reuse)
        return call.completion().whole(generation)

    @llm_completion_callback()
    async def astream_complete(
        self,
        prompt: str,
        formatted: bool = False,  # noqa: FBT001, FBT002 - the base class's signature
        **kwargs: Any,
    ) -> CompletionResponseAsyncGen:
        """`stream_complete` without blocking the event loop."""
        call = await asyncio.to_thread(self._completion_call, prompt, kwargs, formatted=formatted)
        return self._apieces(call, call.completion().piece)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation. tools: that the model may call, LlamaIndex's or in OpenAI's shape.

        The calls are in the message's blocks, and in OpenAI's shape in its
        `additional_kwargs["tool_calls"]`.
        """
        call = self._chat_call(messages, kwargs)
        generation = self.engine.generate(call.prompt, call.params, reuse=call.reuse)
        return call.chat().whole(generation)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """`chat` piece by piece. The prompt is mapped now, the model runs when asked."""
        call = self._chat_call(messages, kwargs)
        return self._pieces(call, call.chat().piece)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` without blocking the event loop."""
        call = await asyncio.to_thread(self._chat_call, messages, kwargs)
        generation = await self.engine.agenerate(call.prompt, call.params, reuse=call.reuse)
        return call.chat().whole(generation)

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """`stream_chat` without blocking the event loop."""
        call = await asyncio.to_thread(self._chat_call, messages, kwargs)
        return self._apieces(call, call.chat().piece)

    def get_tool_calls_from_response(
        self,
        response: ChatResponse,
        error_on_no_tool_call: bool = True,  # noqa: FBT001, FBT002 - the base class's signature
        **kwargs: Any,
    ) -> list[ToolSelection]:
        """The calls that an answer makes. Raises: AnswerError: none, unless that is no error."""
        found = selections(response.message)
        if not found and error_on_no_tool_call:
            raise AnswerError(
                f"the answer calls no tool, it says {str(response.message.content)[:80]!r}; "
                "demand a call with tool_required=True, or pass error_on_no_tool_call=False"
            )
        return found

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,  # noqa: FBT001, FBT002
        allow_parallel_tool_calls: bool = False,  # noqa: FBT001, FBT002
        tool_required: bool = False,  # noqa: FBT001, FBT002
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or ())
        if user_msg is not None:
            messages.append(ChatMessage(user_msg) if isinstance(user_msg, str) else user_msg)
        return {
            "messages": messages,
            "tools": as_openai(tools),
            "tool_required": tool_required,
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def _completion_call(self, text: str, given: Mapping[str, Any], *, formatted: bool) -> Call:
        """A call, checked and mapped; loads the model if that has not happened."""
        options = CallOptions.of_completion(self._own_options, given)
        return options.plain_call(self._text_prompt(text, formatted=formatted))

    def _chat_call(self, messages: Sequence[ChatMessage], given: Mapping[str, Any]) -> Call:
        """As `_completion_call`."""
        options = CallOptions.of_chat(self._own_options, given)
        prompt = self._chat_prompt(messages, options.core_tools())
        return options.call_with_tools(prompt, self.engine)

    def _text_prompt(self, text: str, *, formatted: bool) -> Prompt:
        if formatted:
            return self._noted(text_prompt(text))
        wrap = self.completion_to_prompt or default_completion_to_prompt
        if (
            self.chat_template
            and wrap is default_completion_to_prompt
            and self.metadata.is_chat_model
            and not holds_markup(self.engine.lm.text, segments_of(text, "text"))
        ):
            # To a chat model, a bare text is what the user says.
            return self._chat_prompt([ChatMessage(role=MessageRole.USER, content=text)])
        return self._noted(wrapped_prompt(text, lambda bare: self._extend_prompt(wrap(bare))))

    def _chat_prompt(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> Prompt:
        system = (MessageRole.SYSTEM, self.system_prompt)
        if all((message.role, message.content) != system for message in messages):
            messages = self._extend_messages(list(messages))
        to_prompt = self.messages_to_prompt or ChatTemplate(self._lazy)
        return self._noted(chat_prompt(self._lazy, messages, to_prompt, tools))

    def _noted(self, prompt: Prompt) -> Prompt:
        return note_documents(self.engine, prompt)

    def _pieces(self, call: Call, piece: Callable[[Chunk], _R]) -> Generator[_R, None, None]:
        chunks = self.engine.stream(call.prompt, call.params, reuse=call.reuse)

        def run() -> Generator[_R, None, None]:
            with closing(chunks):
                for chunk in chunks:
                    yield piece(chunk)

        return run()

    async def _apieces(self, call: Call, piece: Callable[[Chunk], _R]) -> AsyncGenerator[_R, None]:
        chunks = self.engine.astream(call.prompt, call.params, reuse=call.reuse)
        async with aclosing(chunks):
            async for chunk in chunks:
                yield piece(chunk)
