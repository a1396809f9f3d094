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
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import ToolSelection, default_completion_to_prompt
from llama_index.core.tools import BaseTool

from pcache_core import Chunk, Generation, Prompt, Tool
from pcache_core.base_engine import Engine
from pcache_core.errors import AnswerError
from pcache_integrations.calls import Call, make_call
from pcache_integrations.documents import holds_markup
from pcache_integrations.llama_index.messages import (
    ChatTemplate,
    as_openai,
    calls_of,
    chat_prompt,
    text_prompt,
    wrapped_prompt,
)
from pcache_integrations.llama_index.model import CachedLLM
from pcache_integrations.llama_index.nodes import note_documents
from pcache_integrations.llama_index.predict import Predicts, response_format
from pcache_integrations.llama_index.responses import ChatAnswer, CompletionAnswer, loud_refusals
from pcache_integrations.llama_index.templates import segments_of

_PLACE = "a call of PromptCacheLLM"
# Code written for any LLM passes these; a call changes nothing about the server, if there is one.
_OF_HOSTED_MODELS = ("extra_headers", "extra_query", "max_retries", "user")
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
        that it has settled. Calls raise CallRefusedError: what they ask can't be done.
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
        mapped, call = self._text_call(prompt, kwargs, formatted=formatted)
        return CompletionAnswer().whole(self._generate(mapped, call))

    @llm_completion_callback()
    def stream_complete(
        self,
        prompt: str,
        formatted: bool = False,  # noqa: FBT001, FBT002 - the base class's signature
        **kwargs: Any,
    ) -> CompletionResponseGen:
        """`complete` piece by piece. The prompt is mapped now, the model runs when asked."""
        mapped, call = self._text_call(prompt, kwargs, formatted=formatted)
        return self._pieces(mapped, call, CompletionAnswer().piece)

    @llm_completion_callback()
    async def acomplete(
        self,
        prompt: str,
        formatted: bool = False,  # noqa: FBT001, FBT002 - the base class's signature
        **kwargs: Any,
    ) -> CompletionResponse:
        """`complete` without blocking the event loop."""
        mapped, call = await asyncio.to_thread(self._text_call, prompt, kwargs, formatted=formatted)
        return CompletionAnswer().whole(await self._agenerate(mapped, call))

    @llm_completion_callback()
    async def astream_complete(
        self,
        prompt: str,
        formatted: bool = False,  # noqa: FBT001, FBT002 - the base class's signature
        **kwargs: Any,
    ) -> CompletionResponseAsyncGen:
        """`stream_complete` without blocking the event loop."""
        mapped, call = await asyncio.to_thread(self._text_call, prompt, kwargs, formatted=formatted)
        return self._apieces(mapped, call, CompletionAnswer().piece)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation. tools: that the model may call, LlamaIndex's or in OpenAI's shape.

        The calls are in the message's blocks, and in OpenAI's shape in its
        `additional_kwargs["tool_calls"]`.
        """
        prompt, call = self._chat_call(messages, kwargs)
        return ChatAnswer(call).whole(self._generate(prompt, call))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """`chat` piece by piece. The prompt is mapped now, the model runs when asked."""
        prompt, call = self._chat_call(messages, kwargs)
        return self._pieces(prompt, call, ChatAnswer(call).piece)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` without blocking the event loop."""
        prompt, call = await asyncio.to_thread(self._chat_call, messages, kwargs)
        return ChatAnswer(call).whole(await self._agenerate(prompt, call))

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """`stream_chat` without blocking the event loop."""
        prompt, call = await asyncio.to_thread(self._chat_call, messages, kwargs)
        return self._apieces(prompt, call, ChatAnswer(call).piece)

    def get_tool_calls_from_response(
        self,
        response: ChatResponse,
        error_on_no_tool_call: bool = True,  # noqa: FBT001, FBT002 - the base class's signature
        **kwargs: Any,
    ) -> list[ToolSelection]:
        """Return the calls that an answer makes.

        Raises: AnswerError: it makes none, and `error_on_no_tool_call` is true.
        """
        found = [
            ToolSelection(tool_id=call.id, tool_name=call.name, tool_kwargs=dict(call.arguments))
            for call in calls_of(response.message)
        ]
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
            "tools": [as_openai(tool) for tool in tools],
            "tool_required": tool_required,
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def _text_call(
        self, text: str, given: Mapping[str, Any], *, formatted: bool
    ) -> tuple[Prompt, Call]:
        """Check a call and map its prompt; loads the model if that has not happened."""
        with loud_refusals():
            call = self._call(given, takes_tools=False)
            prompt = self._text_prompt(text, formatted=formatted)
            return note_documents(self.engine, prompt), call.on(self.engine)

    def _chat_call(
        self, messages: Sequence[ChatMessage], given: Mapping[str, Any]
    ) -> tuple[Prompt, Call]:
        """Check and map as `_text_call` does."""
        with loud_refusals():
            call = self._call(given, takes_tools=True)
            prompt = self._chat_prompt(messages, call.tools)
            return note_documents(self.engine, prompt), call.on(self.engine)

    def _call(self, given: Mapping[str, Any], *, takes_tools: bool) -> Call:
        asked = {name: v for name, v in given.items() if name not in _OF_HOSTED_MODELS}
        wanted = asked.get("response_format")
        if isinstance(wanted, type) and issubclass(wanted, BaseModel):
            asked["response_format"] = response_format(wanted)
        if takes_tools:
            asked["tools"] = [as_openai(tool) for tool in asked.get("tools") or ()]
        return make_call(self._own_options, asked, _PLACE, takes_tools=takes_tools)

    def _text_prompt(self, text: str, *, formatted: bool) -> Prompt:
        if formatted:
            return text_prompt(text)
        wrap = self.completion_to_prompt or default_completion_to_prompt
        if (
            self.chat_template
            and wrap is default_completion_to_prompt
            and self.metadata.is_chat_model
            and not holds_markup(self.engine.lm.text, segments_of(text, "text"))
        ):
            # To a chat model, a bare text is what the user says.
            return self._chat_prompt([ChatMessage(role=MessageRole.USER, content=text)])
        return wrapped_prompt(text, lambda bare: self._extend_prompt(wrap(bare)))

    def _chat_prompt(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> Prompt:
        system = (MessageRole.SYSTEM, self.system_prompt)
        if all((message.role, message.content) != system for message in messages):
            messages = self._extend_messages(list(messages))
        to_prompt = self.messages_to_prompt or ChatTemplate(self._settle())
        return chat_prompt(self.engine, messages, to_prompt, tools)

    def _generate(self, prompt: Prompt, call: Call) -> Generation:
        with loud_refusals():
            return self.engine.generate(prompt, call.params, reuse=call.reuse)

    async def _agenerate(self, prompt: Prompt, call: Call) -> Generation:
        with loud_refusals():
            return await self.engine.agenerate(prompt, call.params, reuse=call.reuse)

    def _pieces(
        self, prompt: Prompt, call: Call, piece: Callable[[Chunk], _R]
    ) -> Generator[_R, None, None]:
        with loud_refusals():
            chunks = self.engine.stream(prompt, call.params, reuse=call.reuse)

        def run() -> Generator[_R, None, None]:
            with loud_refusals(), closing(chunks):
                for chunk in chunks:
                    yield piece(chunk)

        return run()

    async def _apieces(
        self, prompt: Prompt, call: Call, piece: Callable[[Chunk], _R]
    ) -> AsyncGenerator[_R, None]:
        with loud_refusals():
            chunks = self.engine.astream(prompt, call.params, reuse=call.reuse)
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield piece(chunk)
