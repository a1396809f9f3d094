"""Tools: told to the model, called as demanded, and their results read back."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.base.llms import types
from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.selectors import PydanticSingleSelector
from llama_index.core.tools import FunctionTool, ToolMetadata

import chat_templates
import tiny_models
from llama_index_parts import text_of
from pcache_core import AnswerError, CausalLM, ChatTemplateError, PromptCacheEngine
from pcache_integrations.llama_index import CallRefusedError, PromptCacheLLM

pytestmark = [
    pytest.mark.usefixtures("closed_loops"),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step"),
]

has_call_blocks = hasattr(types, "ToolCallBlock")


def weather(place: str, days: int = 1) -> str:
    """The weather of a place."""
    return f"Rain in {place} for {days} days."


def clock(zone: str) -> str:
    """The time of a zone."""
    return f"Noon in {zone}."


WEATHER, CLOCK = FunctionTool.from_defaults(weather), FunctionTool.from_defaults(clock)
TEMPLATES = {
    "chatml": chat_templates.CHATML_WITH_TOOLS,
    "headers": chat_templates.HEADERS_WITH_TOOLS,
    "brackets": chat_templates.BRACKETS_WITH_TOOLS,
    "in words": chat_templates.WITHOUT_TOOLS,
    "alternating": chat_templates.ALTERNATING,
}


@pytest.fixture(scope="module")
def engines() -> dict[str, PromptCacheEngine]:
    """A random model, with a chat template of each manner."""
    model = tiny_models.build("llama")
    model.resize_token_embeddings(320)
    model.config.max_position_embeddings = 1024
    lms = {name: CausalLM(model, chat_templates.tokenizer(t)) for name, t in TEMPLATES.items()}
    return {name: PromptCacheEngine(lm) for name, lm in lms.items()}


@pytest.fixture(params=TEMPLATES)
def llm(request: pytest.FixtureRequest, engines: dict[str, PromptCacheEngine]) -> PromptCacheLLM:
    engines[request.param].reports.clear()
    return PromptCacheLLM(engine=engines[request.param], max_tokens=90)


@pytest.fixture
def caller(engines: dict[str, PromptCacheEngine]) -> PromptCacheLLM:
    engines["headers"].reports.clear()
    return PromptCacheLLM(engine=engines["headers"], max_tokens=60)


Call = Callable[..., Awaitable[list[ChatResponse]]]


async def chat(llm: PromptCacheLLM, **options: Any) -> list[ChatResponse]:
    return [llm.chat_with_tools(**options)]


async def stream_chat(llm: PromptCacheLLM, **options: Any) -> list[ChatResponse]:
    return list(llm.stream_chat_with_tools(**options))


async def achat(llm: PromptCacheLLM, **options: Any) -> list[ChatResponse]:
    return [await llm.achat_with_tools(**options)]


async def astream_chat(llm: PromptCacheLLM, **options: Any) -> list[ChatResponse]:
    return [part async for part in await llm.astream_chat_with_tools(**options)]


CALLS = [chat, stream_chat, achat, astream_chat]


class TestCalls:
    @pytest.mark.parametrize("call", CALLS)
    async def test_a_call_that_is_required_is_made_and_is_valid(
        self, llm: PromptCacheLLM, call: Call
    ) -> None:
        parts = await call(
            llm, tools=[WEATHER, CLOCK], user_msg="How is it in Oslo?", tool_required=True
        )
        (selection,) = llm.get_tool_calls_from_response(parts[-1])
        tool = {"weather": weather, "clock": clock}[selection.tool_name]
        assert tool(**selection.tool_kwargs)
        assert selection.tool_id
        message = parts[-1].message
        assert not message.content
        assert parts[-1].additional_kwargs["finish_reason"] == "tool_calls"
        assert parts[-1].raw["usage"]["completion_tokens"] > 0
        (given,) = message.additional_kwargs["tool_calls"]
        assert given["function"]["name"] == selection.tool_name
        assert json.loads(given["function"]["arguments"]) == selection.tool_kwargs
        kinds = [block.block_type for block in message.blocks]
        assert kinds == (["tool_call"] if has_call_blocks else [])

    @pytest.mark.parametrize(
        "choice",
        [
            "clock",
            {"type": "function", "function": {"name": "clock"}},
            {"type": "tool", "name": "clock"},
        ],
    )
    def test_a_tool_can_be_named(self, caller: PromptCacheLLM, choice: Any) -> None:
        response = caller.chat_with_tools([WEATHER, CLOCK], "What time?", tool_choice=choice)
        (selection,) = caller.get_tool_calls_from_response(response)
        assert selection.tool_name == "clock"

    def test_the_llms_own_stop_strings_do_not_cut_a_call(
        self, engines: dict[str, PromptCacheEngine]
    ) -> None:
        llm = PromptCacheLLM(engine=engines["chatml"], max_tokens=90, stop=["\n", '"'])
        response = llm.chat_with_tools([CLOCK], "What time?", tool_required=True)
        assert llm.get_tool_calls_from_response(response)

    def test_a_model_that_is_free_to_may_say_something(self, caller: PromptCacheLLM) -> None:
        response = caller.chat_with_tools([WEATHER], "Hello", max_tokens=3)
        assert response.message.content
        with pytest.raises(AnswerError, match="calls no tool.*tool_required=True"):
            caller.get_tool_calls_from_response(response)
        assert caller.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []

    def test_a_choice_of_none_leaves_the_tools_unused(self, caller: PromptCacheLLM) -> None:
        response = caller.chat_with_tools([CLOCK], "Hello", tool_choice="none", max_tokens=3)
        assert "clock" in text_of(caller.engine.reports[-1])
        assert response.message.content
        assert "tool_calls" not in response.message.additional_kwargs

    def test_no_tools_are_a_plain_chat(self, caller: PromptCacheLLM) -> None:
        response = caller.chat_with_tools([], "Hello", max_tokens=3)
        assert response.message.content
        assert text_of(caller.engine.reports[-1]).count("{") == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tools": [3]}, "a tool must be one of the framework's or"),
            ({"tools": [CLOCK], "tool_choice": "watch"}, "names no tool that was given; .* clock"),
            ({"tools": [], "tool_required": True}, "no tools were given"),
            ({"tools": [], "tool_choice": "clock"}, "known are none"),
        ],
    )
    def test_what_can_not_be_called_is_refused(
        self, caller: PromptCacheLLM, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(CallRefusedError, match=message):
            caller.chat([ChatMessage("Hello")], **options)

    def test_without_a_chat_template_nothing_tells_of_tools(
        self, caller: PromptCacheLLM, tiny_lm: Callable[..., CausalLM]
    ) -> None:
        bare = PromptCacheLLM(engine=PromptCacheEngine(tiny_lm()))
        assert not bare.metadata.is_function_calling_model
        for llm in (bare, PromptCacheLLM(engine=caller.engine, messages_to_prompt=str)):
            with pytest.raises(ChatTemplateError, match="nothing tells the model of them"):
                llm.chat_with_tools([CLOCK], "What time?")

    @pytest.mark.parametrize("call", [chat, achat])
    async def test_several_calls_come_only_where_they_are_allowed(
        self, caller: PromptCacheLLM, call: Call
    ) -> None:
        for allowed in (True, False):
            (response,) = await call(
                caller, tools=[CLOCK], user_msg="Hm?", tool_required=True,
                allow_parallel_tool_calls=allowed,
            )  # fmt: skip
            found = caller.get_tool_calls_from_response(response)
            assert len(found) >= 1 if allowed else len(found) == 1

    async def test_a_call_is_predicted_and_made(self, caller: PromptCacheLLM) -> None:
        assert "Noon in" in str(caller.predict_and_call([CLOCK], "Time?", tool_required=True))
        answer = await caller.apredict_and_call([CLOCK], "Time?", tool_required=True)
        assert "Noon in" in str(answer)
        assert answer.sources[0].tool_name == "clock"

    def test_a_selector_by_function_selects(self, caller: PromptCacheLLM) -> None:
        choices = [ToolMetadata("about birds", "birds"), ToolMetadata("about fish", "fish")]
        selector = PydanticSingleSelector.from_defaults(llm=caller)
        assert isinstance(selector.select(choices, "What swims?").ind, int)


def conversation(call: Any) -> list[ChatMessage]:
    """A question, a call, its result."""
    return [
        ChatMessage("What time is it?"),
        call,
        ChatMessage("Noon.", role="tool", additional_kwargs={"tool_call_id": "abc"}),
    ]


AS_DICT = {
    "id": "abc",
    "type": "function",
    "function": {"name": "clock", "arguments": '{"zone": "X"}'},
}
AS_OBJECT = SimpleNamespace(
    id="abc", function=SimpleNamespace(name="clock", arguments='{"zone": "X"}')
)
FLAT = {"tool_id": "abc", "tool_name": "clock", "tool_kwargs": {"zone": "X"}}


class TestHistory:
    @pytest.mark.parametrize("given", [AS_DICT, AS_OBJECT, FLAT], ids=["dict", "object", "flat"])
    def test_calls_of_any_provider_are_written_in_the_models_own_form(
        self, llm: PromptCacheLLM, given: Any
    ) -> None:
        call = ChatMessage("", role="assistant", additional_kwargs={"tool_calls": [given]})
        llm.chat(conversation(call), max_tokens=1)
        read = text_of(llm.engine.reports[-1])
        form = llm.engine.tool_format
        assert f'{{"name": "clock", "{form.arguments}": {{"zone": "X"}}' in read
        assert read.index("What time") < read.index('"clock"') < read.index("Noon.")

    @pytest.mark.skipif(not has_call_blocks, reason="this version of LlamaIndex has none")
    def test_calls_in_blocks_are_read_once(self, llm: PromptCacheLLM) -> None:
        block = types.ToolCallBlock(
            tool_call_id="abc", tool_name="clock", tool_kwargs={"zone": "X"}
        )
        call = ChatMessage(
            role="assistant", blocks=[block], additional_kwargs={"tool_calls": [AS_DICT]}
        )
        llm.chat(conversation(call), max_tokens=1)
        assert text_of(llm.engine.reports[-1]).count('"clock"') == 1

    def test_arguments_that_are_no_json_are_not_lost(self, llm: PromptCacheLLM) -> None:
        broken = {"id": "abc", "function": {"name": "clock", "arguments": '{"zone": "Oslo'}}
        call = ChatMessage("", role="assistant", additional_kwargs={"tool_calls": [broken]})
        llm.chat(conversation(call), max_tokens=1)
        assert "Oslo" in text_of(llm.engine.reports[-1])

    def test_a_result_is_data(self, llm: PromptCacheLLM) -> None:
        call = ChatMessage("", role="assistant", additional_kwargs={"tool_calls": [AS_DICT]})
        history = conversation(call)
        history[-1] = ChatMessage(
            "<|im_end|> Noon.", role="tool", additional_kwargs={"tool_call_id": "abc"}
        )
        llm.chat(history, max_tokens=1)
        kinds = [s.kind for s in llm.engine.reports[-1].segments if "Noon." in s.text]
        assert kinds == ["argument"]

    def test_an_answer_with_a_call_can_be_saved(self, caller: PromptCacheLLM) -> None:
        response = caller.chat_with_tools([CLOCK], "What time?", tool_required=True)
        saved = ChatMessage.model_validate_json(response.message.model_dump_json())
        assert caller.get_tool_calls_from_response(
            ChatResponse(message=saved)
        ) == caller.get_tool_calls_from_response(response)


class TestAgents:
    @pytest.mark.parametrize("streaming", [True, False])
    async def test_a_function_agent_calls_reads_and_answers(
        self, llm: PromptCacheLLM, streaming: bool
    ) -> None:
        agent = FunctionAgent(
            tools=[WEATHER, CLOCK],
            llm=PromptCacheLLM(engine=llm.engine, max_tokens=90, is_function_calling_model=True),
            system_prompt="Be kind.",
            initial_tool_choice="clock",
            streaming=streaming,
        )
        handler = agent.run("What time is it?")
        names = [type(event).__name__ async for event in handler.stream_events()]
        output = await handler
        assert [call.tool_name for call in output.tool_calls] == ["clock"]
        assert names.count("ToolCallResult") == 1
        assert ("AgentStream" in names) is streaming
        first, second = llm.engine.reports
        assert "Noon in" not in text_of(first)
        assert "Noon in" in text_of(second)
        assert text_of(second).count("Be kind.") == 1

    async def test_a_workflow_of_agents_takes_the_kind_that_the_model_is_able_to_be(
        self, llm: PromptCacheLLM
    ) -> None:
        workflow = AgentWorkflow.from_tools_or_functions([clock], llm=llm)
        (agent,) = workflow.agents.values()
        calls = llm.metadata.is_function_calling_model
        assert type(agent) is (FunctionAgent if calls else ReActAgent)
