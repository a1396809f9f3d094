"""Rerankers of both frameworks, and the sources under an answer."""

from __future__ import annotations

import pytest
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from pcache_core import CausalLM, PromptCacheEngine
from pcache_integrations import langchain, llama_index

TEXTS = {
    "lamps": "Grumbolt sells lamps and was founded in the town of Widheim in 1868.",
    "kayak": "Ottoline Farquay enjoys kayaking and works as a painter in Pixfirth.",
    "tower": "The tower of Primmouth is closed on Sunday; its garden is open in summer.",
}
QUESTION = "What does Ottoline Farquay do for fun?"


@pytest.fixture(scope="module")
def engine() -> PromptCacheEngine:
    return PromptCacheEngine(CausalLM.from_pretrained("builtin:tiny-rag"))


@pytest.fixture
def documents() -> list[Document]:
    return [Document(text, id=name, metadata={"page": 7}) for name, text in TEXTS.items()]


class Everything(BaseRetriever):
    """Finds all documents, in the order they were given."""

    documents: list[Document]

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        return self.documents


@pytest.mark.parametrize("kind", [langchain.PromptCacheLLM, langchain.ChatPromptCache])
async def test_langchains_reranker_keeps_the_best(
    engine: PromptCacheEngine, documents: list[Document], kind: type
) -> None:
    reranker = langchain.PromptCacheReranker(llm=kind(engine=engine), top_n=2)
    kept = list(reranker.compress_documents(documents, QUESTION))
    assert kept[0].id == "kayak"
    assert len(kept) == 2
    scores = [document.metadata["relevance_score"] for document in kept]
    assert 1 >= scores[0] > scores[1] > 0
    assert kept[0].metadata["page"] == 7
    assert "relevance_score" not in documents[1].metadata
    again = await reranker.acompress_documents(documents, QUESTION)
    assert [document.id for document in again] == [document.id for document in kept]
    asked_again = [document.metadata["relevance_score"] for document in again]
    assert asked_again == pytest.approx(scores, rel=1e-4)
    assert list(reranker.compress_documents([], QUESTION)) == []


def test_it_works_in_a_compression_retriever(
    engine: PromptCacheEngine, documents: list[Document]
) -> None:
    retrievers = pytest.importorskip("langchain_classic.retrievers")
    reranker = langchain.PromptCacheReranker(llm=langchain.PromptCacheLLM(engine=engine), top_n=1)
    retriever = retrievers.ContextualCompressionRetriever(
        base_compressor=reranker, base_retriever=Everything(documents=documents)
    )
    assert [document.id for document in retriever.invoke(QUESTION)] == ["kayak"]


async def test_llama_indexs_reranker_keeps_the_best(engine: PromptCacheEngine) -> None:
    nodes = [NodeWithScore(node=TextNode(id_=n, text=t), score=9.0) for n, t in TEXTS.items()]
    rerank = llama_index.PromptCacheRerank(llm=llama_index.PromptCacheLLM(engine=engine), top_n=2)
    kept = rerank.postprocess_nodes(nodes, query_str=QUESTION)
    assert kept[0].node.node_id == "kayak"
    assert [node.score for node in nodes] == [9.0] * 3
    assert 1 >= kept[0].get_score() > kept[1].get_score() > 0
    bundle = QueryBundle(QUESTION)
    again = await rerank.apostprocess_nodes(nodes, query_bundle=bundle)
    assert [node.node.node_id for node in again] == [node.node.node_id for node in kept]
    assert rerank.postprocess_nodes([], query_str=QUESTION) == []


@pytest.mark.parametrize("top_n", [0, -1])
def test_keeping_nothing_is_refused(engine: PromptCacheEngine, top_n: int) -> None:
    with pytest.raises(ValueError, match="top_n"):
        langchain.PromptCacheReranker(llm=langchain.PromptCacheLLM(engine=engine), top_n=top_n)
    with pytest.raises(ValueError, match="top_n"):
        llama_index.PromptCacheRerank(llm=llama_index.PromptCacheLLM(engine=engine), top_n=top_n)


def _prompt() -> str:
    context = "\n\n".join(TEXTS.values())
    return f"Answer from the documents.\n\n{context}\n\nQuestion: {QUESTION}\nAnswer:"


@pytest.mark.parametrize("streams", [False, True])
def test_a_langchain_answer_names_its_sources(
    engine: PromptCacheEngine, documents: list[Document], *, streams: bool
) -> None:
    chat = langchain.ChatPromptCache(engine=engine, max_tokens=2)
    chat.cache_documents(documents, progress=False)
    if streams:
        pieces = list(chat.stream(_prompt(), reuse="fast", sources=True))
        metadata = pieces[-1].response_metadata or pieces[-2].response_metadata
    else:
        metadata = chat.invoke(_prompt(), reuse="fast", sources=True).response_metadata
    sources = metadata["prompt_cache"]["sources"]
    assert {source["id"] for source in sources} == set(TEXTS)
    assert sum(source["share"] for source in sources) == pytest.approx(1)


def test_a_llama_index_answer_names_its_sources(engine: PromptCacheEngine) -> None:
    llm = llama_index.PromptCacheLLM(engine=engine, max_tokens=2)
    nodes = [TextNode(id_=name, text=text) for name, text in TEXTS.items()]
    llm.cache_documents(nodes, progress=False)
    raw = llm.complete(_prompt(), reuse="fast", sources=True).raw
    assert isinstance(raw, dict)
    sources = raw["prompt_cache"]["sources"]
    assert len(sources) == 3
    assert sum(source["share"] for source in sources) == pytest.approx(1)
