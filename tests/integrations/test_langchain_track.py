"""A tracked vector store is asked in the other's place, and what it finds is known."""

from __future__ import annotations

import asyncio
import copy
import itertools
import pickle
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore, VectorStoreRetriever

from corpus import DOCUMENTS
from langchain_chains import AnswerRetriever, documents_of
from pcache_core import OptionError, PromptCacheEngine
from pcache_integrations._engines import load_lm
from pcache_integrations.langchain import PromptCacheLLM, track

QUESTION = "Who is the mayor?"
_marks = itertools.count(10_000)


@pytest.fixture(scope="module")
def llm() -> PromptCacheLLM:
    return PromptCacheLLM(engine=PromptCacheEngine(load_lm("builtin:tiny-rag")), max_tokens=1)


@pytest.fixture
def store() -> InMemoryVectorStore:
    """A store of documents that no other test has."""
    made = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    mark = next(_marks)
    made.add_documents(
        [Document(f"Sheet {mark}. {text}", id=f"{mark}-{n}") for n, text in enumerate(DOCUMENTS)]
    )
    return made


class Catalogue(InMemoryVectorStore):
    """A store with searches that LangChain's others don't have."""

    def hybrid_search(self, query: str) -> list[Document]:
        """Find the first two."""
        return self.get_by_ids(list(self.store)[:2])

    async def afulltext_search(self, query: str) -> list[Document]:
        """Find the first two, for those who wait."""
        return self.hybrid_search(query)


SEARCHES: dict[str, Any] = {
    "similarity_search": lambda s: s.similarity_search(QUESTION, k=2),
    "with_score": lambda s: [d for d, _ in s.similarity_search_with_score(QUESTION, k=2)],
    "by_vector": lambda s: s.similarity_search_by_vector([0.1] * 8, k=2),
    "search": lambda s: s.search(QUESTION, "similarity", k=2),
    "max_marginal_relevance": lambda s: s.max_marginal_relevance_search(QUESTION, k=2),
    "get_by_ids": lambda s: s.get_by_ids(list(s.store)[:2]),
    "asimilarity_search": lambda s: asyncio.run(s.asimilarity_search(QUESTION, k=2)),
    "asearch": lambda s: asyncio.run(s.asearch(QUESTION, "similarity", k=2)),
    "awith_score": lambda s: [
        d for d, _ in asyncio.run(s.asimilarity_search_with_score(QUESTION, k=2))
    ],
    "of its own": lambda s: s.hybrid_search(QUESTION),
    "of its own, async": lambda s: asyncio.run(s.afulltext_search(QUESTION)),
    "as_retriever": lambda s: s.as_retriever(search_kwargs={"k": 2}).invoke(QUESTION),
    "a retriever's field": lambda s: VectorStoreRetriever(
        vectorstore=s, search_kwargs={"k": 2}
    ).invoke(QUESTION),
}


def documents_in_a_prompt(llm: PromptCacheLLM, found: list[Document]) -> list[str | None]:
    llm.invoke(" ".join(["Look at", *(d.page_content for d in found), "and answer."]))
    return documents_of(llm.engine.reports[-1])


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_what_any_search_finds_is_known(
    llm: PromptCacheLLM, store: InMemoryVectorStore, search: Any
) -> None:
    catalogue = Catalogue(store.embeddings)
    catalogue.store = store.store
    found = search(track(catalogue))
    assert [d.page_content for d in found] == [d.page_content for d in search(catalogue)]
    assert len(found) == 2
    assert documents_in_a_prompt(llm, found) == [d.id for d in found]


def test_what_an_untracked_store_finds_is_not_known(
    llm: PromptCacheLLM, store: InMemoryVectorStore
) -> None:
    own = InMemoryVectorStore(store.embeddings)  # of a text that no other test announces
    own.add_documents([Document("Nobody tracks the shop where Una Yiltman buys her paper.")])
    track(own)
    assert documents_in_a_prompt(llm, own.similarity_search(QUESTION, k=1)) == []


def test_a_tracked_store_is_a_vector_store_with_all_that_the_other_has(
    store: InMemoryVectorStore,
) -> None:
    tracked = track(store)
    assert isinstance(tracked, VectorStore)
    assert track(tracked) is tracked
    assert tracked.embeddings is store.embeddings
    assert tracked.store is store.store
    tracked.store = dict(store.store)
    assert tracked.store is store.store
    tracked.add_documents([Document("A new one, which is long enough.", id="new")])
    assert store.get_by_ids(["new"])
    tracked.delete(["new"])
    assert not store.get_by_ids(["new"])
    with pytest.raises(AttributeError, match="no_such_thing"):
        tracked.no_such_thing  # noqa: B018


def test_a_copy_searches_its_own_documents(store: InMemoryVectorStore) -> None:
    for copied in (copy.deepcopy(track(store)), pickle.loads(pickle.dumps(track(store)))):
        copied.delete(list(copied.store))
        assert copied.similarity_search(QUESTION) == []
        assert len(store.similarity_search(QUESTION, k=2)) == 2


@pytest.mark.parametrize(
    "nothing", [None, "store", object(), AnswerRetriever(), InMemoryVectorStore]
)
def test_what_is_not_a_vector_store_is_refused(nothing: Any) -> None:
    with pytest.raises(OptionError, match="track takes a vector store"):
        track(nothing)
