"""Answers of the built-in model, through LlamaIndex, are right with and without reuse."""

from __future__ import annotations

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import RetrieverQueryEngine

from corpus import OPENING, QUESTIONS
from llama_index_parts import QA_TEMPLATE, AnswerRetriever, nodes
from pcache_core import PromptCacheEngine
from pcache_integrations._engines import load_lm
from pcache_integrations.llama_index import PromptCacheLLM

pytestmark = pytest.mark.usefixtures("closed_loops")


@pytest.fixture(scope="module")
def engine() -> PromptCacheEngine:
    return PromptCacheEngine(load_lm("builtin:tiny-rag"))


@pytest.mark.parametrize("reuse", ["off", "exact", "fast"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_query_engine_answers_right(engine: PromptCacheEngine, question: str, reuse: str) -> None:
    llm = PromptCacheLLM(engine=engine, reuse=reuse, max_tokens=16, stop=["\n"])
    query_engine = RetrieverQueryEngine.from_args(
        AnswerRetriever(), llm=llm, text_qa_template=PromptTemplate(QA_TEMPLATE)
    )
    assert str(query_engine.query(question)).strip() == QUESTIONS[question][0]
    report = engine.reports[-1]
    assert report.reuse == reuse
    assert (report.encoded_tokens + report.cached_tokens > 0) or reuse != "fast"


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_from_states_cached_beforehand_are_right(question: str) -> None:
    llm = PromptCacheLLM(
        engine=PromptCacheEngine(load_lm("builtin:tiny-rag")),
        reuse="fast",
        max_tokens=16,
        stop=["\n"],
    )
    llm.cache_documents(nodes(), progress=False)
    query_engine = RetrieverQueryEngine.from_args(
        AnswerRetriever(), llm=llm, text_qa_template=PromptTemplate(QA_TEMPLATE)
    )
    assert str(query_engine.query(question)).strip() == QUESTIONS[question][0]
    report = llm.engine.reports[-1]
    assert [s.source for s in report.segments if s.kind == "document"] == ["memory", "memory"]
    # The prompt's own opening was not cached beforehand.
    assert [s.text for s in report.segments if s.source == "encoded"] == [OPENING]


def test_a_chat_engine_answers_right(engine: PromptCacheEngine) -> None:
    """The built-in model's chat template only joins the messages, which suits its own format."""
    llm = PromptCacheLLM(engine=engine, max_tokens=16, stop=["\n"])
    question = "Where was Jerome Fertden born?"
    chat = ContextChatEngine.from_defaults(
        retriever=AnswerRetriever(),
        llm=llm,
        memory=ChatMemoryBuffer.from_defaults(token_limit=1000),
        context_template=OPENING + "{context_str}\n\nQuestion: ",
    )
    assert str(chat.chat(question)).strip() == QUESTIONS[question][0]
