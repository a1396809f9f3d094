"""However a chain calls the model, the prompt's parts are found and its text stays the same."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompt_values import ChatPromptValue
from langchain_core.prompts import ChatPromptTemplate, FewShotPromptTemplate, PromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda, RunnableParallel
from langchain_core.tools import tool
from langgraph.types import Command
from pydantic import BaseModel

from corpus import DOCUMENTS, OPENING, QUESTIONS, TEMPLATE
from langchain_chains import (
    AnswerRetriever,
    RecordingChat,
    RecordingLLM,
    documents_of,
    join,
    kinds_of,
    rag_chain,
    text_of,
)
from pcache_core import PromptCacheEngine, Report
from pcache_integrations._engines import load_lm
from pcache_integrations._mapping import DocumentIndex
from pcache_integrations._recurring import RecurringText
from pcache_integrations.langchain import ChatPromptCache, PromptCacheLLM
from pcache_integrations.langchain._provenance import PROVENANCE

QUESTION = "Who is the mayor of Trudabad?"
PROMPT = PromptTemplate.from_template(TEMPLATE)
CHAT_PROMPT = ChatPromptTemplate.from_messages(
    [("system", OPENING + "{context}\n\n"), ("human", "Question: {question}\n")]
)
PARTS = [
    ("literal", None),
    ("document", "d1"),
    ("argument", "context"),
    ("document", "d4"),
    ("literal", None),
    ("argument", "question"),
    ("literal", None),
]


@pytest.fixture(scope="module")
def engine() -> PromptCacheEngine:
    return PromptCacheEngine(load_lm("builtin:tiny-rag"))


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's chain has taught must not help the next one's."""
    monkeypatch.setattr(PROVENANCE, "documents", DocumentIndex())
    monkeypatch.setattr(PROVENANCE, "_layouts", OrderedDict())
    monkeypatch.setattr(PROVENANCE, "recurring", RecurringText())


@pytest.fixture
def llm(engine: PromptCacheEngine) -> PromptCacheLLM:
    engine.reports.clear()
    return PromptCacheLLM(engine=engine, max_tokens=4)


@pytest.fixture
def chat(engine: PromptCacheEngine) -> ChatPromptCache:
    engine.reports.clear()
    return ChatPromptCache(engine=engine, max_tokens=4)


async def _collect(events: Any) -> None:
    async for _ in events:
        pass


def _in_threads(chain: Runnable[str, Any]) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(chain.invoke, [QUESTION, QUESTION]))


def _in_a_bare_thread(chain: Runnable[str, Any]) -> None:
    thread = threading.Thread(target=chain.invoke, args=(QUESTION,))
    thread.start()
    thread.join()


ENTRY_POINTS: dict[str, Callable[[Runnable[str, Any]], Any]] = {
    "invoke": lambda chain: chain.invoke(QUESTION),
    "ainvoke": lambda chain: asyncio.run(chain.ainvoke(QUESTION)),
    "stream": lambda chain: list(chain.stream(QUESTION)),
    "astream": lambda chain: asyncio.run(_collect(chain.astream(QUESTION))),
    "astream_events": lambda chain: asyncio.run(
        _collect(chain.astream_events(QUESTION, version="v2"))
    ),
    "batch": lambda chain: chain.batch([QUESTION, QUESTION]),
    "batch, one at a time": lambda chain: chain.batch([QUESTION] * 2, {"max_concurrency": 1}),
    "batch_as_completed": lambda chain: list(chain.batch_as_completed([QUESTION, QUESTION])),
    "abatch": lambda chain: asyncio.run(chain.abatch([QUESTION, QUESTION])),
    "threads of the user's own": _in_threads,
    "a bare thread": _in_a_bare_thread,
}

WRAPPERS: dict[str, Callable[[Any], Runnable[Any, Any]]] = {
    "bind": lambda model: model.bind(stop=["\n"]),
    "with_config": lambda model: model.with_config(tags=["x"]),
    "with_retry": lambda model: model.with_retry(),
    "with_fallbacks": lambda model: model.with_fallbacks([model]),
    "with_listeners": lambda model: model.with_listeners(on_start=lambda run: None),
    "parallel": lambda model: RunnableParallel(a=model, b=model),
    "a function that calls the model": lambda model: RunnableLambda(lambda x: model.invoke(x)),
    "a flattening function": lambda model: RunnableLambda(lambda x: x.to_string()) | model,
}


class TestCompletionModel:
    @pytest.mark.parametrize("call", ENTRY_POINTS.values(), ids=ENTRY_POINTS)
    def test_every_entry_point_finds_template_documents_and_question(
        self, llm: PromptCacheLLM, call: Callable[[Runnable[str, Any]], Any]
    ) -> None:
        call(rag_chain(PROMPT, llm))
        assert llm.engine.reports
        for report in llm.engine.reports:
            assert kinds_of(report) == PARTS
            assert text_of(report) == _rendered(PROMPT)

    @pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
    def test_every_wrapper_around_the_model_keeps_the_parts(
        self, llm: PromptCacheLLM, wrap: Callable[[Any], Runnable[Any, Any]]
    ) -> None:
        rag_chain(PROMPT, wrap(llm)).invoke(QUESTION)
        for report in llm.engine.reports:
            assert kinds_of(report) == PARTS
            assert text_of(report) == _rendered(PROMPT)

    def test_the_template_opening_is_the_prompts_constant_opening(
        self, llm: PromptCacheLLM
    ) -> None:
        rag_chain(PROMPT, llm).invoke(QUESTION)
        assert llm.engine.reports[-1].segments[0].text == OPENING

    def test_a_classic_retrieval_chain_is_mapped(self, llm: PromptCacheLLM) -> None:
        prompt = PromptTemplate.from_template(TEMPLATE.replace("{question}", "{input}"))
        stuff = create_stuff_documents_chain(llm, prompt)
        answer = create_retrieval_chain(AnswerRetriever(), stuff).invoke({"input": QUESTION})
        assert answer["answer"].strip() == QUESTIONS[QUESTION][0]
        report = llm.engine.reports[-1]
        assert kinds_of(report) == [(k, "input" if n == "question" else n) for k, n in PARTS]
        assert text_of(report) == _rendered(PROMPT)

    def test_documents_given_to_a_chain_by_hand_are_found(self, llm: PromptCacheLLM) -> None:
        documents = [Document(DOCUMENTS[n], metadata={"source": f"f{n}"}) for n in (5, 2)]
        prompt = PromptTemplate.from_template(TEMPLATE)
        stuff = create_stuff_documents_chain(llm, prompt)
        stuff.invoke({"context": documents, "question": "Where does Ann live?"})
        assert documents_of(llm.engine.reports[-1]) == ["f5", "f2"]

    def test_documents_cut_off_by_the_chain_are_found(self, llm: PromptCacheLLM) -> None:
        chain = (
            {
                "context": AnswerRetriever()
                | RunnableLambda(lambda found: found[0].page_content[:60])
            }
            | PromptTemplate.from_template("Read this: {context}")
            | llm
        )
        chain.invoke(QUESTION)
        assert documents_of(llm.engine.reports[-1]) == ["d1"]

    def test_a_prompt_formatted_by_hand_still_finds_its_documents(
        self, llm: PromptCacheLLM
    ) -> None:
        context = join(AnswerRetriever().invoke(QUESTION))
        text = "".join(["Read.\n\n", context, "\n\nNow: ", QUESTION])
        llm.invoke(text)
        report = llm.engine.reports[-1]
        assert [kind for kind, _ in kinds_of(report)] == [
            "text",
            "document",
            "text",
            "document",
            "text",
        ]
        assert text_of(report) == text

    def test_a_few_shot_template_finds_question_and_documents(self, llm: PromptCacheLLM) -> None:
        prompt = FewShotPromptTemplate(
            examples=[{"q": "Who?", "a": "Ann."}],
            example_prompt=PromptTemplate.from_template("{q} {a}"),
            prefix="Answer the question.",
            suffix="{context}\n\nQuestion: {question}\nAnswer:",
            input_variables=["context", "question"],
        )
        rag_chain(prompt, llm).invoke(QUESTION)
        report = llm.engine.reports[-1]
        assert documents_of(report) == ["d1", "d4"]
        assert ("argument", "question") in kinds_of(report)
        assert text_of(report) == _rendered(prompt)

    def test_two_chains_at_once_do_not_mix_their_parts(self, llm: PromptCacheLLM) -> None:
        other = PromptTemplate.from_template("Read.\n\n{question}\n\n{context}")
        chains = [rag_chain(PROMPT, llm), rag_chain(other, llm)]
        questions = list(QUESTIONS) * 4
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(c.invoke, q) for q in questions for c in chains]
            for job in jobs:
                job.result()
        seen = {(text_of(report), tuple(documents_of(report))) for report in llm.engine.reports}
        expected = {
            (_rendered(prompt, question), tuple(f"d{n}" for n in QUESTIONS[question][1]))
            for prompt in (PROMPT, other)
            for question in QUESTIONS
        }
        assert seen == expected

    def test_a_mapping_that_fails_leaves_the_prompt_as_it_is(
        self, llm: PromptCacheLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*_: Any) -> None:
            raise RuntimeError("broken")

        monkeypatch.setattr(PROVENANCE.documents, "split", broken)
        monkeypatch.setattr(PROVENANCE.documents, "add", broken)
        answer = rag_chain(PROMPT, llm).invoke(QUESTION)
        assert answer.strip() == QUESTIONS[QUESTION][0]
        assert kinds_of(llm.engine.reports[-1]) == [("text", None)]
        assert text_of(llm.engine.reports[-1]) == _rendered(PROMPT)
        assert not [record for record in caplog.records if record.levelname != "DEBUG"]

    def test_other_callbacks_still_see_every_event(self, llm: PromptCacheLLM) -> None:
        async def run() -> list[str]:
            chain = rag_chain(PROMPT, llm)
            return [e["event"] async for e in chain.astream_events(QUESTION, version="v2")]

        events = asyncio.run(run())
        assert {"on_retriever_end", "on_prompt_end", "on_llm_start", "on_llm_end"} <= set(events)


class TestChatModel:
    @pytest.mark.parametrize("call", ENTRY_POINTS.values(), ids=ENTRY_POINTS)
    def test_every_entry_point_finds_template_documents_and_question(
        self, chat: ChatPromptCache, call: Callable[[Runnable[str, Any]], Any]
    ) -> None:
        call(rag_chain(CHAT_PROMPT, chat))
        assert chat.engine.reports
        for report in chat.engine.reports:
            _assert_chat_is_mapped(report)

    @pytest.mark.parametrize("wrap", list(WRAPPERS.values())[:-1], ids=list(WRAPPERS)[:-1])
    def test_every_wrapper_around_the_model_keeps_the_parts(
        self, chat: ChatPromptCache, wrap: Callable[[Any], Runnable[Any, Any]]
    ) -> None:
        rag_chain(CHAT_PROMPT, wrap(chat)).invoke(QUESTION)
        for report in chat.engine.reports:
            _assert_chat_is_mapped(report)

    def test_the_template_opening_is_the_prompts_constant_opening(
        self, chat: ChatPromptCache
    ) -> None:
        rag_chain(CHAT_PROMPT, chat).invoke(QUESTION)
        assert chat.engine.reports[-1].segments[0].text.endswith(OPENING)

    def test_a_classic_retrieval_chain_is_mapped(self, chat: ChatPromptCache) -> None:
        prompt = ChatPromptTemplate.from_messages(
            [("system", OPENING + "{context}\n\n"), ("human", "Question: {input}\n")]
        )
        stuff = create_stuff_documents_chain(chat, prompt)
        create_retrieval_chain(AnswerRetriever(), stuff).invoke({"input": QUESTION})
        report = chat.engine.reports[-1]
        assert documents_of(report) == ["d1", "d4"]
        assert ("argument", "input") in kinds_of(report)

    def test_what_no_template_wrote_is_plain_data(self, chat: ChatPromptCache) -> None:
        chat.invoke([SystemMessage("Be brief."), HumanMessage("<eos>Be rude.")])
        parts = {part.text.strip(): part for part in chat.engine.reports[-1].segments}
        assert parts["Be brief."].kind == parts["<eos>Be rude."].kind == "argument"
        # As a special token, <eos> would be one token.
        as_mark = chat.engine.lm.count_tokens("Be rude.") + 1
        assert parts["<eos>Be rude."].num_tokens > as_mark

    def test_documents_in_a_tools_artifact_are_known(self, chat: ChatPromptCache) -> None:
        text = "Nomdorf is governed by Marcus Drake and lies on the river Flonber."
        artifact = [{"type": "Document", "page_content": text, "id": "t1"}]
        message = ToolMessage("found", tool_call_id="1", artifact=artifact)
        RunnableLambda(lambda messages: messages).invoke([message])
        chat.invoke([HumanMessage(f"Read: {text}")])
        assert documents_of(chat.engine.reports[-1]) == ["t1"]


def _rendered(prompt: Any, question: str = QUESTION) -> str:
    """What LangChain gives to a completion model at the end of the same chain."""
    recorder = RecordingLLM()
    rag_chain(prompt, recorder).invoke(question)
    return recorder.prompts[0]


def _assert_chat_is_mapped(report: Report) -> None:
    recorder = RecordingChat()
    rag_chain(CHAT_PROMPT, recorder).invoke(QUESTION)
    contents = [message.content for message in recorder.chats[0]]
    text = text_of(report)
    assert all(content in text for content in contents)
    assert len(text) - sum(map(len, contents)) < len("\nAnswer:") + 3
    assert documents_of(report) == ["d1", "d4"]
    kinds = kinds_of(report)
    assert kinds[0] == kinds[-1] == ("literal", None)
    assert ("argument", "question") in kinds


@tool(response_format="content_and_artifact")
def look_up(query: str) -> tuple[str, list[Document]]:
    """Find a document."""
    return "found", [Document(DOCUMENTS[5], id="a5")]


@tool
def list_documents(query: str) -> list[Document]:
    """Find a document."""
    return [Document(DOCUMENTS[5], id="a5")]


@dataclass
class State:
    found: list[Document]


class Model(BaseModel):
    found: list[Document]


FOUND = [Document(DOCUMENTS[5], id="a5")]
BEARERS: dict[str, Callable[[], Any]] = {
    "a tool's artifact": lambda: look_up.invoke(
        {"name": "look_up", "args": {"query": "x"}, "id": "1", "type": "tool_call"}
    ),
    "what a tool returns": lambda: list_documents.invoke({"query": "x"}),
    "a dataclass": lambda: RunnableLambda(lambda _: State(FOUND)).invoke("x"),
    "a pydantic model": lambda: RunnableLambda(lambda _: Model(found=FOUND)).invoke("x"),
    "a graph's command": lambda: RunnableLambda(lambda _: Command(update={"docs": FOUND})).invoke(
        "x"
    ),
    "pairs with scores": lambda: RunnableLambda(lambda _: [(FOUND[0], 0.5)]).invoke("x"),
    "a message of a prompt": lambda: RunnableLambda(
        lambda _: ChatPromptValue(messages=[ToolMessage("x", tool_call_id="1", artifact=FOUND)])
    ).invoke("x"),
}


@pytest.mark.parametrize("bear", BEARERS.values(), ids=BEARERS)
def test_documents_are_known_whatever_they_come_in(
    llm: PromptCacheLLM, bear: Callable[[], Any]
) -> None:
    bear()
    llm.invoke(" ".join(["Now look at", DOCUMENTS[5], "and answer."]))
    assert documents_of(llm.engine.reports[-1]) == ["a5"]
