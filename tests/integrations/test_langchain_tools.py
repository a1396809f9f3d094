"""Tools, structured output and content blocks of the chat model."""

from __future__ import annotations

import doctest
import json
from collections.abc import Callable
from typing import Annotated, Any

import jsonschema
import pytest
from langchain.agents import create_agent
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

import chat_templates
import tiny_models
from corpus import DOCUMENTS
from langchain_chains import text_of
from pcache_core import CausalLM, OptionError, PromptCacheEngine, PromptError
from pcache_integrations._engines import load_lm
from pcache_integrations.langchain import ChatPromptCache


@tool
def weather(place: str, days: int = 1) -> str:
    """The weather of a place."""
    return f"Rain in {place} for {days} days."


class Clock(BaseModel):
    """The time of a place."""

    zone: str = Field(description="time zone")


CLOCK_OF_ANTHROPIC = {
    "name": "Clock",
    "description": "The time of a place.",
    "input_schema": Clock.model_json_schema(),
    "cache_control": {"type": "ephemeral"},
}


class Person(BaseModel):
    """A person."""

    name: str
    age: int
    pets: list[str] = []


class PersonDict(TypedDict):
    """A person."""

    name: Annotated[str, ..., "full name"]
    age: Annotated[int, ..., "in years"]


@pytest.fixture(scope="module")
def engine() -> PromptCacheEngine:
    return PromptCacheEngine(load_lm("builtin:tiny-rag"))


@pytest.fixture
def chat(engine: PromptCacheEngine) -> ChatPromptCache:
    return ChatPromptCache(engine=engine, max_tokens=60)


@pytest.fixture(scope="module")
def with_template() -> Callable[[str], ChatPromptCache]:
    """A random model with a chat template of the test's own."""
    model = tiny_models.build("llama")
    model.resize_token_embeddings(320)

    def make(template: str) -> ChatPromptCache:
        lm = CausalLM(model, chat_templates.tokenizer(template))
        return ChatPromptCache(engine=PromptCacheEngine(lm), max_tokens=2)

    return make


def test_the_examples_of_the_docstring_run() -> None:
    tests = doctest.DocTestFinder(recurse=False).find(ChatPromptCache)
    results = [doctest.DocTestRunner().run(test) for test in tests]
    assert [result.failed for result in results] == [0] * len(results)
    assert sum(result.attempted for result in results) > 10


class TestTools:
    @pytest.mark.parametrize(
        "choice",
        [
            "Clock",
            {"type": "function", "function": {"name": "Clock"}},
            {"type": "tool", "name": "Clock"},
        ],
    )
    @pytest.mark.parametrize("clock", [Clock, CLOCK_OF_ANTHROPIC])
    def test_a_demanded_call_is_made(self, chat: ChatPromptCache, clock: Any, choice: Any) -> None:
        answer = chat.bind_tools([weather, clock], tool_choice=choice).invoke("What time is it?")
        (call,) = answer.tool_calls
        assert call["name"] == "Clock"
        Clock(**call["args"])
        assert not answer.content
        assert answer.response_metadata["finish_reason"] == "tool_calls"
        assert answer.usage_metadata["output_tokens"] > 0

    @pytest.mark.parametrize("choice", ["any", "required", True, {"type": "any"}])
    def test_any_tool_is_one_of_them(self, chat: ChatPromptCache, choice: Any) -> None:
        answer = chat.bind_tools([weather, Clock], tool_choice=choice).invoke("Hello")
        assert [call["name"] in ("weather", "Clock") for call in answer.tool_calls] == [True]

    def test_the_models_own_stop_strings_cut_no_demanded_answer(self) -> None:
        chat = ChatPromptCache(model="builtin:tiny-rag", stop=["\n", "{"], max_tokens=200)
        called = chat.bind_tools([weather], tool_choice="any").invoke("How is it in Oslo?")
        assert [call["name"] for call in called.tool_calls] == ["weather"]
        Clock.model_validate(chat.with_structured_output(Clock).invoke("Now?").model_dump())
        assert "\n" not in chat.invoke("Hello").content

    @pytest.mark.parametrize("choice", [None, "auto", "none", False])
    def test_a_model_may_answer_without_a_call(self, chat: ChatPromptCache, choice: Any) -> None:
        answer = chat.bind_tools([weather], tool_choice=choice).invoke(f"{DOCUMENTS[0]}\nWho?")
        assert answer.content
        assert not answer.tool_calls

    def test_a_streamed_call_is_the_invoked_one_and_shows_no_markup(
        self, chat: ChatPromptCache
    ) -> None:
        model = chat.bind_tools([weather], tool_choice="weather")
        chunks = list(model.stream("Weather?"))
        joined = chunks[0]
        for chunk in chunks[1:]:
            joined += chunk
        invoked = model.invoke("Weather?")
        assert [(c["name"], c["args"]) for c in joined.tool_calls] == [
            (c["name"], c["args"]) for c in invoked.tool_calls
        ]
        assert not joined.text
        assert sum(bool(chunk.tool_call_chunks) for chunk in chunks) == 1
        assert joined.response_metadata["finish_reason"] == "tool_calls"

    async def test_async_calls_are_the_same(self, chat: ChatPromptCache) -> None:
        model = chat.bind_tools([weather], tool_choice="any")
        expected = model.invoke("Weather?").tool_calls[0]["args"]
        assert (await model.ainvoke("Weather?")).tool_calls[0]["args"] == expected
        streamed = [call async for c in model.astream("Weather?") for call in c.tool_call_chunks]
        assert json.loads(streamed[0]["args"]) == expected

    @pytest.mark.parametrize(
        ("tools", "choice", "message"),
        [
            ([weather], "whether", "names no tool that was given; known are weather"),
            ([weather], {"type": "function"}, "names no tool"),
            ([weather], 3.5, "must be a tool's name"),
            ([3], None, "can't be described"),
            ([{"type": "web_search"}], None, "server|described"),
        ],
    )
    def test_what_can_not_be_called_is_refused(
        self, chat: ChatPromptCache, tools: Any, choice: Any, message: str
    ) -> None:
        with pytest.raises(OptionError, match=message):
            chat.bind_tools(tools, tool_choice=choice)

    @pytest.mark.parametrize(
        "template",
        [
            chat_templates.CHATML_WITH_TOOLS,
            chat_templates.HEADERS_WITH_TOOLS,
            chat_templates.BRACKETS_WITH_TOOLS,
            chat_templates.WITHOUT_TOOLS,
        ],
    )
    @pytest.mark.parametrize("as_blocks", [True, False])
    def test_calls_and_results_are_a_part_of_the_history(
        self, with_template: Callable[..., ChatPromptCache], template: str, as_blocks: bool
    ) -> None:
        chat = with_template(template)
        call = {"name": "weather", "args": {"place": "Oslo"}, "id": "call_1", "type": "tool_call"}
        use = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"place": "Oslo"}}
        result = [{"type": "text", "text": "Rain."}] if as_blocks else "Rain."
        history: list[BaseMessage] = [
            HumanMessage("Oslo?"),
            AIMessage([use] if as_blocks else "", tool_calls=[call]),
            ToolMessage(result, tool_call_id="call_1"),
        ]
        chat.bind_tools([weather]).invoke(history)
        text = text_of(chat.engine.reports[-1])
        assert '{"place": "Oslo"}' in text
        assert "Rain." in text
        assert "The weather of a place." in text or template == chat_templates.BRACKETS_WITH_TOOLS
        assert text.index("Oslo?") < text.index('{"place": "Oslo"}') < text.index("Rain.")

    def test_a_failed_tool_is_known_as_such(
        self, with_template: Callable[..., ChatPromptCache]
    ) -> None:
        chat = with_template(chat_templates.CHATML_WITH_TOOLS)
        call = {"name": "weather", "args": {}, "id": "1", "type": "tool_call"}
        chat.invoke(
            [
                HumanMessage("Oslo?"),
                AIMessage("", tool_calls=[call]),
                ToolMessage("no place", tool_call_id="1", status="error"),
            ]
        )
        assert "Error: no place" in text_of(chat.engine.reports[-1])

    def test_an_agent_calls_its_tool_and_goes_on(self, chat: ChatPromptCache) -> None:
        class Scripted(ChatPromptCache):
            """Calls a tool first, and then answers."""

            def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
                return _by_turn(
                    ChatPromptCache.bind_tools(self, tools, tool_choice="any"),
                    ChatPromptCache.bind_tools(self, tools, tool_choice="none"),
                )

        agent = create_agent(Scripted(engine=chat.engine, max_tokens=60), [weather])
        messages = agent.invoke({"messages": [HumanMessage("Weather in Oslo?")]})["messages"]
        kinds = [type(message).__name__ for message in messages]
        assert kinds == ["HumanMessage", "AIMessage", "ToolMessage", "AIMessage"]
        assert messages[2].content.startswith("Rain in ")
        assert messages[2].content in text_of(chat.engine.reports[-1])


def _by_turn(first: Any, then: Any) -> Any:
    from langchain_core.runnables import RunnableLambda

    def choose(messages: Any) -> Any:
        chat = messages.to_messages() if hasattr(messages, "to_messages") else messages
        return then if isinstance(chat[-1], ToolMessage) else first

    return RunnableLambda(choose)


class TestStructuredOutput:
    @pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
    @pytest.mark.parametrize("schema", [Person, PersonDict, Person.model_json_schema()])
    @pytest.mark.parametrize("temperature", [0.0, 2.0])
    def test_answers_are_of_the_schema(
        self, chat: ChatPromptCache, method: Any, schema: Any, temperature: float
    ) -> None:
        model = ChatPromptCache(engine=chat.engine, max_tokens=120, temperature=temperature, seed=4)
        answer = model.with_structured_output(schema, method=method).invoke("Who is it?")
        if schema is Person:
            assert isinstance(answer, Person)
        else:
            jsonschema.validate(answer, Person.model_json_schema())
            assert set(answer) <= {"name", "age", "pets"}

    def test_json_mode_does_without_a_schema(self, chat: ChatPromptCache) -> None:
        answer = chat.with_structured_output(method="json_mode").invoke("Who is it?")
        assert isinstance(answer, dict)

    def test_the_raw_message_comes_along_when_asked_for(self, chat: ChatPromptCache) -> None:
        answer = chat.with_structured_output(Person, include_raw=True).invoke("Who is it?")
        assert isinstance(answer["raw"], AIMessage)
        assert Person(**json.loads(answer["raw"].text)) == answer["parsed"]
        assert answer["parsing_error"] is None

    def test_an_answer_that_a_calls_stop_string_cuts_short_is_a_parsing_error(
        self, chat: ChatPromptCache
    ) -> None:
        model = chat.with_structured_output(Person)
        with pytest.raises(OutputParserException):
            model.invoke("Who is it?", stop=['"name"'])

    def test_streamed_answers_grow_to_the_invoked_one(self, chat: ChatPromptCache) -> None:
        model = chat.with_structured_output(Person.model_json_schema())
        assert list(model.stream("Who is it?"))[-1] == model.invoke("Who is it?")

    @pytest.mark.parametrize(
        ("wanted", "schema"),
        [
            ({"type": "json_object"}, {"type": "object"}),
            (Person, Person.model_json_schema()),
            (
                {"type": "json_schema", "json_schema": {"schema": Person.model_json_schema()}},
                Person.model_json_schema(),
            ),
        ],
    )
    def test_a_call_may_name_the_format_of_its_answer(
        self, chat: ChatPromptCache, wanted: Any, schema: Any
    ) -> None:
        answer = chat.invoke("Who is it?", response_format=wanted)
        jsonschema.validate(json.loads(answer.text), schema)

    def test_text_is_a_format_too(self, chat: ChatPromptCache) -> None:
        assert (
            chat.invoke("Who?", response_format={"type": "text"}).text == chat.invoke("Who?").text
        )

    def test_with_tools_an_answer_is_a_call_or_of_the_format(self, chat: ChatPromptCache) -> None:
        model = chat.bind_tools([weather], response_format=Person)
        for seed in range(6):
            answer = model.invoke("Who is it?", temperature=2.0, seed=seed)
            if not answer.tool_calls:
                Person(**json.loads(answer.text))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"schema": Person, "method": "magic"}, "method='magic' is unknown"),
            ({}, "needs a schema"),
            ({"schema": Person, "stict": True}, "did you mean|known are"),
        ],
    )
    def test_what_can_not_be_asked_for_is_refused(
        self, chat: ChatPromptCache, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(OptionError, match=message):
            chat.with_structured_output(**options)

    @pytest.mark.parametrize("wanted", [{"type": "xml"}, {"type": "json_schema"}, 7])
    def test_a_format_that_there_is_not_is_refused(
        self, chat: ChatPromptCache, wanted: Any
    ) -> None:
        with pytest.raises(OptionError, match="response_format"):
            chat.invoke("Who?", response_format=wanted)


class TestBlocks:
    def _kinds(self, chat: ChatPromptCache) -> list[tuple[str, str]]:
        return [(s.kind, s.text) for s in chat.engine.reports[-1].segments if s.kind != "literal"]

    def test_blocks_of_text_are_modules_and_the_last_is_the_question(
        self, with_template: Callable[..., ChatPromptCache]
    ) -> None:
        chat = with_template(chat_templates.WITHOUT_TOOLS)
        blocks = [{"type": "text", "text": text} for text in ("Bees sting.", "Ann sings.", "Who?")]
        chat.invoke([SystemMessage("Be kind."), HumanMessage(blocks)])
        assert self._kinds(chat) == [
            ("argument", "Be kind."),
            ("document", "Bees sting."),
            ("document", "Ann sings."),
            ("argument", "Who?"),
        ]

    @pytest.mark.parametrize("hint", ["cache_control", "prompt_cache_breakpoint"])
    def test_a_block_that_is_marked_for_a_cache_is_a_module(
        self, with_template: Callable[..., ChatPromptCache], hint: str
    ) -> None:
        chat = with_template(chat_templates.WITHOUT_TOOLS)
        block = {"type": "text", "text": "A long rule.", hint: {"type": "ephemeral"}}
        chat.invoke([SystemMessage([block]), HumanMessage("Who?")])
        assert self._kinds(chat) == [("document", "A long rule."), ("argument", "Who?")]

    @pytest.mark.parametrize(
        "hints",
        [
            {"prompt_cache_key": "a", "prompt_cache_retention": "24h"},
            {"cache_control": {"type": "ephemeral"}},
            {"prompt_cache_options": {}},
        ],
    )
    def test_cache_hints_of_a_call_are_no_error(
        self, chat: ChatPromptCache, hints: dict[str, Any]
    ) -> None:
        assert chat.invoke("Who?", **hints).text == chat.invoke("Who?").text

    @pytest.mark.parametrize(
        "block",
        [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
            {"type": "audio", "base64": "AA", "mime_type": "audio/wav"},
            {"type": "file", "file": {}},
        ],
    )
    def test_what_is_no_text_is_refused_by_name(
        self, chat: ChatPromptCache, block: dict[str, Any]
    ) -> None:
        with pytest.raises(PromptError, match=f"message 1 .* type '{block['type']}'"):
            chat.invoke([HumanMessage([block])])

    def test_thoughts_of_other_models_are_left_out(
        self, with_template: Callable[..., ChatPromptCache]
    ) -> None:
        chat = with_template(chat_templates.WITHOUT_TOOLS)
        thought = {"type": "thinking", "thinking": "hmm", "signature": "x"}
        said = {"type": "text", "text": "Ann."}
        chat.invoke([HumanMessage("Who?"), AIMessage([thought, said]), HumanMessage("Sure?")])
        assert "hmm" not in text_of(chat.engine.reports[-1])
        assert "Ann." in text_of(chat.engine.reports[-1])
