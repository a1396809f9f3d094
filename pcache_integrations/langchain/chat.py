"""The chat model.

**Input flow (LangChain → engine)**

`ChatPromptCache._call()`, for every way to ask:

- `make_call()` checks what the call asks for: sampling, tools (`as_openai()`), a format of the
  answer (`as_format()`), log probabilities. `Call.on()` makes a grammar of it.
- `chat_prompt()` turns messages into the engine's: roles, tool calls, and contents as segments.
  `Watcher.segments()` knows which text is a template's, which a document's, which data.
- `prompt_from_turns()` renders them with the model's own chat template.

**Output flow (engine → LangChain)**

`MessageAnswer.whole()` or, for each chunk of a stream, `MessageAnswer.piece()`:

- `Call.read()` or `AnswerReader.parts()` tell text and tool calls apart.
- `usage_metadata()`, `generation_info()` and `chat_logprobs()` say what the answer took.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool

from pcache_core import Prompt
from pcache_core.base_engine import Engine
from pcache_core.errors import ChatTemplateError
from pcache_core.params import DEFAULT_MODEL
from pcache_integrations.calls import Call, as_choice, check_names, core_tool, make_call
from pcache_integrations.langchain.messages import as_openai, chat_prompt
from pcache_integrations.langchain.model import CachedModel, standard_errors
from pcache_integrations.langchain.results import MessageAnswer
from pcache_integrations.langchain.structured import Method, as_format, structured


class ChatPromptCache(CachedModel, BaseChatModel):
    """A chat model that computes only what is new in a conversation.

    Messages are rendered by the model's own chat template. What a prompt template wrote is
    template text; everything else in a message is plain data, and can't forge a role's mark.
    Blocks of text in a message's content are modules of their own, apart from what is asked.

    Setup:
        `pip install pcache-integrations`. No key and no server; the weights are loaded when they
        are first needed, once for all objects of equal options.

    Key init args:
        model: a directory, a hub id, a `.gguf` file, `ollama:NAME`; by default a small chat model.
        base_url: of a vLLM server that runs the model (`pcache serve`), instead of this process.
        reuse: `off`, `exact`, `fast`, `balanced` or `high`.
        store: `memory`, a folder, or the URL of a server or an object store.
        max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop, speculative:
            how answers are made; each may differ by call.
        streaming: as in every LangChain chat model, whether `invoke` streams inside.

    Instantiate:
        >>> from pcache_integrations.langchain import ChatPromptCache
        >>> chat = ChatPromptCache(model="builtin:tiny-rag", max_tokens=64)

    Invoke:
        >>> type(chat.invoke([("system", "Be brief."), ("human", "Who sang?")])).__name__
        'AIMessage'

    Stream:
        >>> pieces = [chunk.text for chunk in chat.stream("Who sang?")]

    Async:
        >>> import asyncio
        >>> type(asyncio.run(chat.ainvoke("Who sang?"))).__name__
        'AIMessage'

    Tool calling:
        A call that is demanded is made and is valid for the tool's schema, whatever the model.

        >>> def weather(place: str) -> str:
        ...     '''The weather of a place.'''
        ...     return "Rain."
        >>> model = chat.bind_tools([weather], tool_choice="any")
        >>> [call["name"] for call in model.invoke("How is it in Oslo?").tool_calls]
        ['weather']

    Structured output:
        >>> from pydantic import BaseModel
        >>> class Person(BaseModel):
        ...     name: str
        ...     age: int
        >>> type(chat.with_structured_output(Person).invoke("Who sang?")).__name__
        'Person'

    Usage metadata:
        `cache_read` counts tokens that were reused, `cache_creation` those that were encoded for
        later; both are a part of `input_tokens`.

        >>> sorted(chat.invoke("Who sang?").usage_metadata["input_token_details"])
        ['cache_creation', 'cache_read']

    Response metadata:
        >>> sorted(chat.invoke("Who sang?").response_metadata)
        ['finish_reason', 'model_name', 'model_provider', 'prompt_cache']

        With `logprobs=True` and `top_logprobs=N` also `logprobs`, as OpenAI has them.
    """

    streaming: bool = False

    def __init__(self, *, engine: Engine | None = None, **options: Any) -> None:
        """Take the options. The profile is the model's own unless one is given."""
        # Older versions of langchain-core have no profiles.
        if "profile" in type(self).model_fields and options.get("profile") is None:
            options["profile"] = _profile(engine, options)
        super().__init__(engine=engine, **options)

    @property
    def _llm_type(self) -> str:
        return "chat-prompt-cache"

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return the model with tools that it may call.

        tools: functions, classes, LangChain tools, or mappings of OpenAI's or Anthropic's shape.
        tool_choice: `auto`, `any` (or True), `none`, a tool's name, or a mapping that names one.
            A call that is demanded is made, and valid for the tool's schema, whatever the model.
        parallel_tool_calls: whether an answer may hold several calls; by default where none is
            demanded.
        Raises: OptionError: a tool that can't be described, a choice that names none.
        """
        described = as_openai(tools)
        as_choice(tool_choice, [core_tool(tool) for tool in described])
        named = {"tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls}
        given = {name: value for name, value in named.items() if value is not None}
        return self.bind(tools=described, **given, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return the model with answers of a schema, always valid if `max_tokens` allows for any.

        schema: a pydantic class, a TypedDict, a JSON schema or a tool's description.
        method: `json_schema` and `json_mode` write the answer itself, and `json_mode` does without
            a schema, too; `function_calling` calls a function that takes it.
        include_raw: return the message, what was parsed of it, and the error if that failed.
        strict: False lets objects have more properties than the schema names.
        Raises: OptionError: no schema, an unknown method.
        """
        check_names(kwargs, (), f"with_structured_output of {type(self).__name__}")
        return structured(self, schema, method, include_raw=include_raw, strict=strict)

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Count the tokens of the prompt that a call with these messages and tools has.

        Messages that the model's chat template refuses are counted as text.

        Raises: PromptError: a message holds something other than text.
        """
        if not messages or self.custom_get_token_ids is not None:
            return super().get_num_tokens_from_messages(messages, tools)
        told = [core_tool(tool) for tool in as_openai(tools or ())]
        try:
            return self._count(chat_prompt(self.engine, messages, told))
        except ChatTemplateError:
            return super().get_num_tokens_from_messages(messages)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with standard_errors():
            prompt, call = self._call(messages, stop, kwargs)
            generation = self.engine.generate(prompt, call.params, reuse=call.reuse)
        return self._answer(call).whole(generation)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with standard_errors():
            prompt, call = await asyncio.to_thread(self._call, messages, stop, kwargs)
            generation = await self.engine.agenerate(prompt, call.params, reuse=call.reuse)
        return self._answer(call).whole(generation)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        return self._pieces(partial(self._call, messages, stop, kwargs), run_manager)

    def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        return self._apieces(partial(self._call, messages, stop, kwargs), run_manager)

    def _answer(self, call: Call) -> MessageAnswer:
        return MessageAnswer(call, self.model)

    def _call(
        self, messages: Sequence[BaseMessage], stop: list[str] | None, given: Mapping[str, Any]
    ) -> tuple[Prompt, Call]:
        """Check one call and render its prompt; loads the model if that has not happened."""
        # `stream` LangChain passes on after acting upon it; schemas are always kept to.
        asked = {name: v for name, v in given.items() if name not in ("stream", "strict")}
        asked["stop"] = stop
        asked["tools"] = as_openai(asked.get("tools") or ())
        asked["response_format"] = as_format(asked.get("response_format"))
        call = make_call(self._own_options, asked, self._place, takes_tools=True).on(self.engine)
        return chat_prompt(self.engine, messages, call.tools), call


def _profile(engine: Engine | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Say what agents and middleware ask of a model, without loading it for that."""
    length = engine.lm.context_length if engine else None
    if engine is None and options.get("base_url") is None:
        from pcache_core.lm import context_length_on_disk

        length = context_length_on_disk(options.get("model", DEFAULT_MODEL))
    return {
        "text_inputs": True,
        "image_inputs": False,
        "text_outputs": True,
        "tool_calling": True,
        "tool_choice": True,
        "structured_output": True,
        **({} if length is None else {"max_input_tokens": length}),
    }
