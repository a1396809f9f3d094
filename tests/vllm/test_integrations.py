"""LangChain's and LlamaIndex's models, answered by a real vLLM server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessageChunk
from langchain_core.prompts import PromptTemplate
from llama_index.core import SummaryIndex
from llama_index.core.schema import TextNode
from pydantic import BaseModel

from pcache_core.errors import ModelError, OptionError
from pcache_core.evaluation.data import Item, WorldOptions, tiny_world
from pcache_core.evaluation.world.questions import OPENING
from pcache_integrations.langchain import ChatPromptCache, PromptCacheLLM
from pcache_integrations.llama_index import PromptCacheLLM as LlamaIndexLLM
from vllm_server import Cluster

pytestmark = pytest.mark.timeout(900)  # servers take a minute to start, on a busy machine many

TINY = "builtin:tiny-rag"
TEMPLATE = PromptTemplate.from_template(
    OPENING.replace("{", "{{") + "{context}\n\nQuestion: {question}\nAnswer:"
)


def item(seed: int) -> Item:
    (one,) = tiny_world(WorldOptions(documents=12, seed=seed), 1).items
    return one


def filled(one: Item, contexts: Sequence[str]) -> dict[str, str]:
    return {"context": "\n\n".join(contexts), "question": one.question}


def test_a_langchain_model_needs_a_base_url_alone_and_says_what_was_cached(
    cluster: Cluster,
) -> None:
    one = item(101)
    llm = PromptCacheLLM(model=TINY, base_url=cluster.first.url, max_tokens=12, reuse="fast")
    assert llm.cache_documents([Document(page_content=text) for text in one.contexts]).kept == 12
    chain = TEMPLATE | llm
    first = chain.invoke(filled(one, one.contexts))
    llm.engine.flush()
    pieces = list(chain.stream(filled(one, one.contexts[::-1])))
    report = llm.engine.reports[-1]
    assert "".join(pieces) == chain.invoke(filled(one, one.contexts[::-1]))
    assert len(pieces) > 2
    assert first
    documents = [s for s in report.segments if s.kind == "document"]
    assert len(documents) == 12
    assert report.cached_tokens >= 0.9 * sum(s.num_tokens for s in documents)
    result = llm.generate([TEMPLATE.format(**filled(one, one.contexts))] * 2)
    assert result.llm_output is not None
    usage = result.llm_output["token_usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 2 * report.cached_tokens - 64
    info = result.generations[0][0].generation_info
    assert info is not None
    assert info["prompt_cache"]["reuse"] == "fast"


async def test_a_langchain_model_answers_many_at_once_without_blocking(cluster: Cluster) -> None:
    one = item(102)
    llm = PromptCacheLLM(model=TINY, base_url=cluster.first.url, max_tokens=8, reuse="fast")
    chain = TEMPLATE | llm
    alone = await asyncio.to_thread(chain.invoke, filled(one, one.contexts))
    assert await chain.abatch([filled(one, one.contexts)] * 4) == [alone] * 4
    assert "".join([piece async for piece in chain.astream(filled(one, one.contexts))]) == alone


def test_a_chat_model_has_its_usage_and_answers_in_a_schema(cluster: Cluster) -> None:
    class Person(BaseModel):
        name: Literal["Ann", "Berth"]
        sang: bool

    chat = ChatPromptCache(model=TINY, base_url=cluster.first.url, max_tokens=48, reuse="balanced")
    total = AIMessageChunk(content="")
    for chunk in chat.stream("Who sang?"):
        assert isinstance(chunk, AIMessageChunk)
        total += chunk
    message = chat.invoke("Who sang?")
    assert total.content == message.content
    assert total.usage_metadata is not None
    assert message.usage_metadata is not None
    assert total.usage_metadata["input_tokens"] == message.usage_metadata["input_tokens"] > 0
    assert "repairs nothing" in message.response_metadata["prompt_cache"]["fallback_reason"]
    assert isinstance(chat.with_structured_output(Person).invoke("Who sang?"), Person)


def test_a_llama_index_model_answers_from_an_index_it_cached(cluster: Cluster) -> None:
    one = item(103)
    llm = LlamaIndexLLM(model=TINY, base_url=cluster.first.url, max_tokens=12, reuse="fast")
    llm.set_global_tokenizer()
    nodes = [TextNode(text=text, id_=str(n)) for n, text in enumerate(one.contexts)]
    assert llm.cache_documents(SummaryIndex(nodes), progress=False).kept == 12
    SummaryIndex(nodes).as_query_engine(llm=llm).query(one.question)
    llm.engine.flush()
    SummaryIndex(nodes[::-1]).as_query_engine(llm=llm).query(one.question)
    report = llm.engine.reports[-1]
    documents = [s for s in report.segments if s.kind == "document"]
    assert {s.name for s in documents} == {str(n) for n in range(12)}
    assert report.cached_tokens >= 0.9 * sum(s.num_tokens for s in documents)


async def test_a_llama_index_model_streams_and_counts_as_openai_does(cluster: Cluster) -> None:
    llm = LlamaIndexLLM(model=TINY, base_url=cluster.first.url, max_tokens=6)
    whole = await llm.acomplete("Who sang?")
    last = None
    async for piece in await llm.astream_complete("Who sang?"):
        last = piece
    assert last is not None
    assert last.text == whole.text
    for raw in (whole.raw, last.raw):
        assert isinstance(raw, dict)
        assert raw["usage"]["prompt_tokens"] > 0
        assert "cached_tokens" in raw["usage"]["prompt_tokens_details"]


def test_a_model_that_the_server_does_not_have_is_named(cluster: Cluster) -> None:
    llm = PromptCacheLLM(model="other", base_url=cluster.first.url)
    with pytest.raises(ModelError, match="no model 'other', but builtin:tiny-rag"):
        llm.invoke("x")


@pytest.mark.parametrize("option", [{"store": "./states"}, {"dtype": "float32"}])
def test_what_the_server_settles_is_refused(option: dict[str, str]) -> None:
    with pytest.raises(OptionError, match="settled where the server is started"):
        PromptCacheLLM(model=TINY, base_url="http://localhost:1", **option)


def test_a_server_that_is_not_there_is_named() -> None:
    llm = PromptCacheLLM(model=TINY, base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:9 gives no answer.*pcache serve"):
        llm.invoke("x")
