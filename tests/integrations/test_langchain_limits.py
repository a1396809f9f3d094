"""What LangChain's agents and middleware rely on: counts, limits, standard errors, time."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core import exceptions
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)

from pcache_core import CausalLM, OptionError, PromptCacheEngine
from pcache_core.errors import ContextLengthError, DeadlineExceededError, PromptError
from pcache_integrations._engines import load_lm
from pcache_integrations.langchain import ChatPromptCache, PromptCacheLLM

HISTORY: list[BaseMessage] = [
    message
    for number in range(300)
    for message in (HumanMessage(f"Question {number}?"), AIMessage(f"Answer {number}."))
]


async def _gathered(pieces: Any) -> list[Any]:
    return [piece async for piece in pieces]


# Every way to ask: (model, input, options) → nothing of interest.
WAYS: dict[str, Callable[..., Any]] = {
    "invoke": lambda m, x, **k: m.invoke(x, **k),
    "ainvoke": lambda m, x, **k: asyncio.run(m.ainvoke(x, **k)),
    "stream": lambda m, x, **k: list(m.stream(x, **k)),
    "astream": lambda m, x, **k: asyncio.run(_gathered(m.astream(x, **k))),
    "batch": lambda m, x, **k: m.batch([x, x], **k),
    "abatch": lambda m, x, **k: asyncio.run(m.abatch([x, x], **k)),
}


@pytest.fixture(scope="module")
def engine() -> PromptCacheEngine:
    return PromptCacheEngine(load_lm("builtin:tiny-rag"))


@pytest.fixture(params=[PromptCacheLLM, ChatPromptCache], ids=["completion", "chat"])
def model(request: pytest.FixtureRequest, engine: PromptCacheEngine) -> Any:
    return request.param(engine=engine, max_tokens=4)


@pytest.fixture
def chat(engine: PromptCacheEngine) -> ChatPromptCache:
    return ChatPromptCache(engine=engine, max_tokens=4)


def weather(place: str) -> str:
    """The weather of a place."""
    return f"Rain in {place}."


class TestCounts:
    @pytest.mark.parametrize(
        "messages",
        [
            [HumanMessage("Where does Ada live?")],
            [SystemMessage("Be brief."), *HISTORY[:6], HumanMessage("And now?")],
        ],
    )
    def test_messages_are_counted_as_the_prompt_has_them(
        self, model: Any, messages: list[BaseMessage]
    ) -> None:
        model.invoke(messages)
        counted = model.get_num_tokens_from_messages(messages)
        assert counted == model.engine.reports[-1].prompt_tokens

    def test_tools_are_counted_with_them(self, chat: ChatPromptCache) -> None:
        messages: list[BaseMessage] = [HumanMessage("How is it in Oslo?")]
        chat.bind_tools([weather]).invoke(messages)
        counted = chat.get_num_tokens_from_messages(messages, [weather])
        assert counted == chat.engine.reports[-1].prompt_tokens
        assert counted > chat.get_num_tokens_from_messages(messages)

    def test_a_part_of_a_chat_is_counted_whatever_it_begins_with(
        self, chat: ChatPromptCache
    ) -> None:
        parts: list[list[BaseMessage]] = [
            [],
            [AIMessage("Hello.")],
            [ToolMessage("Rain.", tool_call_id="1")],
        ]
        counts = [chat.get_num_tokens_from_messages(part) for part in parts]
        assert counts[0] == 0
        assert all(count > 0 for count in counts[1:])

    def test_what_is_trimmed_to_a_limit_fits_it(self, model: Any) -> None:
        limit = model.engine.lm.context_length - 4
        short = trim_messages(
            HISTORY, max_tokens=limit, token_counter=model, strategy="last", start_on="human"
        )
        model.invoke(short)
        assert limit - 100 < model.engine.reports[-1].prompt_tokens <= limit


class TestErrors:
    @pytest.mark.parametrize("way", WAYS)
    def test_a_prompt_beyond_the_context_is_an_overflow(self, model: Any, way: str) -> None:
        with pytest.raises(exceptions.ContextOverflowError, match="holds 2048") as caught:
            WAYS[way](model, "x y " * 2048)
        assert isinstance(caught.value, ContextLengthError)

    @pytest.mark.parametrize("way", WAYS)
    def test_an_answer_that_takes_too_long_is_a_timeout(self, model: Any, way: str) -> None:
        with pytest.raises(exceptions.ModelTimeoutError) as caught:
            WAYS[way](model, "Where does Ada live?", timeout=0.001)
        assert isinstance(caught.value, DeadlineExceededError)
        assert caught.value.is_retryable

    @pytest.mark.parametrize("way", WAYS)
    def test_what_is_asked_wrongly_is_not_worth_a_retry(self, model: Any, way: str) -> None:
        with pytest.raises(exceptions.ModelInvalidRequestError) as caught:
            WAYS[way](model, "Where does Ada live?", temperature=-1)
        assert isinstance(caught.value, OptionError)
        assert not caught.value.is_retryable

    @pytest.mark.parametrize("kind", [PromptCacheLLM, ChatPromptCache])
    def test_a_model_that_can_not_be_loaded_is_an_error_of_the_model(self, kind: Any) -> None:
        with pytest.raises(exceptions.ModelError, match="no/such"):
            kind(model="no/such/model").invoke("hi")

    def test_such_an_error_survives_a_process_border(self, chat: ChatPromptCache) -> None:
        with pytest.raises(PromptError) as caught:
            chat.invoke("x y " * 2048)
        again = pickle.loads(pickle.dumps(caught.value))
        assert isinstance(again, exceptions.ContextOverflowError)
        assert isinstance(again, ContextLengthError)
        assert str(again) == str(caught.value)

    def test_middleware_recovers_from_an_overflow(self, chat: ChatPromptCache) -> None:
        """Its summary's prompt is too long at first; it cuts that at the standard error."""
        middleware = SummarizationMiddleware(
            model=chat,
            trigger=("tokens", 1000),
            keep=("messages", 2),
            trim_tokens_to_summarize=None,
            token_counter=chat.get_num_tokens_from_messages,  # four letters a token is too few here
            summary_prompt="Summarise:\n{messages}",
        )
        agent = create_agent(chat, [], middleware=[middleware])
        done = agent.invoke({"messages": [*HISTORY, HumanMessage("Bye.")]})
        assert len(done["messages"]) < 10


class TestProfile:
    def test_it_says_the_contexts_length_before_the_model_is_loaded(self) -> None:
        chat = ChatPromptCache(model="builtin:tiny-rag", namespace="unused")
        assert chat.engine_handle is not None
        assert chat.profile is not None
        assert chat.profile["max_input_tokens"] == chat.engine.lm.context_length
        assert not ChatPromptCache(model="no/such/model").profile.get("max_input_tokens")  # type: ignore[union-attr]

    def test_it_is_that_of_the_engine_that_is_given(self, tiny_lm: Callable[..., CausalLM]) -> None:
        lm = tiny_lm()
        chat = ChatPromptCache(engine=PromptCacheEngine(lm))
        assert chat.profile is not None
        assert chat.profile["max_input_tokens"] == lm.context_length

    def test_one_that_is_given_is_kept(self, engine: PromptCacheEngine) -> None:
        chat = ChatPromptCache(engine=engine, profile={"max_input_tokens": 7})
        assert chat.profile == {"max_input_tokens": 7}

    def test_middleware_takes_a_share_of_the_context(self, chat: ChatPromptCache) -> None:
        middleware = SummarizationMiddleware(
            model=chat,
            trigger=("fraction", 0.1),
            keep=("messages", 2),
            token_counter=chat.get_num_tokens_from_messages,
            summary_prompt="Summarise:\n{messages}",
        )
        agent = create_agent(chat, [], middleware=[middleware])
        done = agent.invoke({"messages": [*HISTORY[:60], HumanMessage("Bye.")]})
        assert len(done["messages"]) < 60
