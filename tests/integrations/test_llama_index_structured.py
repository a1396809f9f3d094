"""Structured answers: valid for their class, whatever the model, in every way to ask for them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.program import LLMTextCompletionProgram
from llama_index.core.prompts import ChatPromptTemplate, RichPromptTemplate
from llama_index.core.prompts.base import SelectorPromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel, Field

import chat_templates
import tiny_models
from llama_index_parts import FixedRetriever, chat_lm, nodes, text_of
from pcache_core import CausalLM, PromptCacheEngine
from pcache_integrations._engines import load_lm
from pcache_integrations.llama_index import CallRefusedError, PromptCacheLLM

pytestmark = pytest.mark.usefixtures("closed_loops")


class Pet(BaseModel):
    """An animal."""

    kind: Literal["cat", "dog"]
    legs: int = Field(ge=0, le=4)


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=6)
    born: int = Field(ge=1000, le=2000)
    pets: list[Pet] = Field(max_length=1)


ABOUT = PromptTemplate("Tell me of {who}.\n")


def random_model() -> CausalLM:
    model = tiny_models.build("llama")
    model.resize_token_embeddings(320)
    model.config.max_position_embeddings = 1500
    return CausalLM(model, chat_templates.tokenizer(chat_templates.CHATML_WITH_TOOLS))


@pytest.fixture(scope="module", params=["completion", "chat", "random"])
def engine(request: pytest.FixtureRequest) -> PromptCacheEngine:
    """A model that answers questions, the same in a chat, and one that says anything."""
    make: dict[str, Callable[[], CausalLM]] = {
        "completion": lambda: load_lm("builtin:tiny-rag"), "chat": chat_lm, "random": random_model,
    }  # fmt: skip
    return PromptCacheEngine(make[request.param]())


@pytest.fixture
def llm(engine: PromptCacheEngine) -> PromptCacheLLM:
    engine.reports.clear()
    return PromptCacheLLM(engine=engine, max_tokens=120)


@pytest.fixture(scope="module")
def chat_engine() -> PromptCacheEngine:
    return PromptCacheEngine(chat_lm())


@pytest.fixture
def one_llm(chat_engine: PromptCacheEngine) -> PromptCacheLLM:
    chat_engine.reports.clear()
    return PromptCacheLLM(engine=chat_engine, max_tokens=120)


Predict = Callable[..., Awaitable[list[Any]]]


async def predict(llm: PromptCacheLLM, template: Any = ABOUT, **options: Any) -> list[Any]:
    return [llm.structured_predict(Person, template, options, who="Ann")]


async def apredict(llm: PromptCacheLLM, template: Any = ABOUT, **options: Any) -> list[Any]:
    return [await llm.astructured_predict(Person, template, options, who="Ann")]


async def stream(llm: PromptCacheLLM, template: Any = ABOUT, **options: Any) -> list[Any]:
    return list(llm.stream_structured_predict(Person, template, options, who="Ann"))


async def astream(llm: PromptCacheLLM, template: Any = ABOUT, **options: Any) -> list[Any]:
    parts = await llm.astream_structured_predict(Person, template, options, who="Ann")
    return [part async for part in parts]


ALL = [predict, apredict, stream, astream]
TEMPLATES = {
    "plain": ABOUT,
    "chat": ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "Who is {who}?")]),
    "jinja": RichPromptTemplate("{% chat role='user' %}Who is {{ who }}?{% endchat %}"),
    "selector": SelectorPromptTemplate(default_template=ABOUT),
}


class TestPredictions:
    @pytest.mark.parametrize("ask", ALL)
    async def test_an_object_of_the_class_is_predicted(
        self, llm: PromptCacheLLM, ask: Predict
    ) -> None:
        found = (await ask(llm))[-1]
        assert type(found) is Person
        assert text_of(llm.engine.reports[-1]).count("JSON schema to follow") == 1

    @pytest.mark.parametrize("ask", ALL)
    @pytest.mark.parametrize("name", TEMPLATES)
    async def test_whatever_the_template(
        self, one_llm: PromptCacheLLM, name: str, ask: Predict
    ) -> None:
        assert type((await ask(one_llm, TEMPLATES[name]))[-1]) is Person
        report = one_llm.engine.reports[-1]
        assert [s.kind for s in report.segments if s.text.strip() == "Ann"] == ["argument"]

    async def test_the_template_is_left_as_it_was(self, one_llm: PromptCacheLLM) -> None:
        template = PromptTemplate("Tell me of {who}.\n")
        for ask in ALL:
            await ask(one_llm, template)
        assert template.output_parser is None
        one_llm.predict(
            template,
            who="Ann",
        )
        assert "schema" not in text_of(one_llm.engine.reports[-1])

    @pytest.mark.parametrize("ask", [stream, astream])
    async def test_a_stream_shows_the_object_grow(
        self, one_llm: PromptCacheLLM, ask: Predict
    ) -> None:
        parts = await ask(one_llm)
        known = [sum(value is not None for value in vars(part).values()) for part in parts]
        assert known[0] == 0
        assert known[-1] == 3
        assert known == sorted(known)
        assert sum(0 < number < 3 for number in known) > 0

    @pytest.mark.parametrize("ask", ALL)
    async def test_options_of_the_call_are_honoured(
        self, one_llm: PromptCacheLLM, ask: Predict
    ) -> None:
        await ask(one_llm, reuse="off", seed=3, temperature=1.0)
        assert one_llm.engine.reports[-1].reuse == "off"
        with pytest.raises(CallRefusedError, match="raise max_tokens"):
            await ask(one_llm, max_tokens=2)

    def test_the_llms_own_stop_strings_do_not_cut_an_object(
        self, chat_engine: PromptCacheEngine
    ) -> None:
        llm = PromptCacheLLM(engine=chat_engine, max_tokens=120, stop=['"', ","])
        assert type(llm.structured_predict(Person, ABOUT, who="Ann")) is Person


class TestOtherWays:
    @pytest.mark.filterwarnings("ignore:The `json` method")  # by LlamaIndex's streams
    async def test_a_structured_llm_answers_with_objects(self, one_llm: PromptCacheLLM) -> None:
        wrapper = one_llm.as_structured_llm(Person)
        chat = [ChatMessage("Who is Ann?")]
        parts = [
            wrapper.chat(chat), await wrapper.achat(chat), list(wrapper.stream_chat(chat))[-1],
            [part async for part in await wrapper.astream_chat(chat)][-1],
            wrapper.complete("Who is Ann?"), await wrapper.acomplete("Who is Ann?"),
        ]  # fmt: skip
        assert [type(part.raw) for part in parts] == [Person] * len(parts)

    @pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "accumulate"])
    async def test_a_query_engine_answers_with_objects(
        self, one_llm: PromptCacheLLM, mode: str
    ) -> None:
        query_engine = RetrieverQueryEngine.from_args(
            FixedRetriever(nodes()[:1]),
            llm=one_llm,
            response_mode=ResponseMode(mode),
            output_cls=Person,
        )
        response = await query_engine.aquery("Who?")
        if mode != "accumulate":  # which writes them into a text
            assert type(response.response) is Person  # type: ignore[union-attr]

    @pytest.mark.parametrize("chosen", [PydanticProgramMode.LLM, PydanticProgramMode.FUNCTION])
    async def test_the_way_can_be_chosen(
        self, chat_engine: PromptCacheEngine, chosen: PydanticProgramMode
    ) -> None:
        llm = PromptCacheLLM(
            engine=chat_engine,
            max_tokens=150,
            pydantic_program_mode=chosen,
            is_function_calling_model=True,
        )
        for ask in (predict, apredict):
            assert type((await ask(llm))[-1]) is Person
            by_function = "JSON schema to follow" not in text_of(chat_engine.reports[-1])
            assert by_function is (chosen is PydanticProgramMode.FUNCTION)

    def test_a_program_of_llama_indexs_is_told_the_format(self, one_llm: PromptCacheLLM) -> None:
        program = LLMTextCompletionProgram.from_defaults(
            output_cls=Person, prompt_template_str="Tell me of {who}.", llm=one_llm
        )
        schema = Person.model_json_schema()
        form = {"type": "json_schema", "json_schema": {"name": "Person", "schema": schema}}
        assert type(program(llm_kwargs={"response_format": form}, who="Ann")) is Person


class TestResponseFormat:
    FORMATS: dict[str, Any] = {
        "class": Person,
        "schema": {
            "type": "json_schema",
            "json_schema": {"name": "p", "schema": Person.model_json_schema()},
        },
    }

    @pytest.mark.parametrize("name", FORMATS)
    async def test_answers_follow_it(self, one_llm: PromptCacheLLM, name: str) -> None:
        chat, form = [ChatMessage("Who is Ann?")], self.FORMATS[name]
        said = [
            one_llm.chat(chat, response_format=form).message.content,
            list(one_llm.stream_chat(chat, response_format=form))[-1].message.content,
            (await one_llm.achat(chat, response_format=form)).message.content,
            one_llm.complete("Ann?", response_format=form).text,
            (await one_llm.acomplete("Ann?", response_format=form)).text,
        ]
        for text in said:
            Person.model_validate_json(text)

    def test_any_object_will_do(self, one_llm: PromptCacheLLM) -> None:
        text = one_llm.complete("Ann?", response_format={"type": "json_object"}, max_tokens=40).text
        assert isinstance(json.loads(text), dict)
        assert one_llm.complete("Ann?", response_format={"type": "text"}, max_tokens=3)

    @pytest.mark.parametrize("form", [3, dict, {"type": "xml"}, {"type": "json_schema"}, "json"])
    def test_what_is_no_format_is_refused(self, one_llm: PromptCacheLLM, form: Any) -> None:
        with pytest.raises(CallRefusedError, match="response_format"):
            one_llm.complete("Ann?", response_format=form)
