"""A tracked vector store is the store it was, and what it finds is known."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from pydantic import BaseModel

from corpus import DOCUMENTS
from langchain_chains import AnswerRetriever
from pcache_core import OptionError
from pcache_integrations._mapping import DocumentIndex
from pcache_integrations.langchain import track
from pcache_integrations.langchain._provenance import PROVENANCE

QUESTION = "Who is the mayor?"


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PROVENANCE, "documents", DocumentIndex())


@pytest.fixture
def store() -> InMemoryVectorStore:
    made = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    made.add_documents([Document(text, id=f"d{n}") for n, text in enumerate(DOCUMENTS)])
    return made


SEARCHES: dict[str, Any] = {
    "similarity_search": lambda s: s.similarity_search(QUESTION, k=2),
    "with_score": lambda s: [d for d, _ in s.similarity_search_with_score(QUESTION, k=2)],
    "by_vector": lambda s: s.similarity_search_by_vector([0.1] * 8, k=2),
    "search": lambda s: s.search(QUESTION, "similarity", k=2),
    "asimilarity_search": lambda s: asyncio.run(s.asimilarity_search(QUESTION, k=2)),
    "asearch": lambda s: asyncio.run(s.asearch(QUESTION, "similarity", k=2)),
    "awith_score": lambda s: [
        d for d, _ in asyncio.run(s.asimilarity_search_with_score(QUESTION, k=2))
    ],
}


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_what_any_search_finds_is_known(store: InMemoryVectorStore, search: Any) -> None:
    untracked = search(store)
    assert len(PROVENANCE.documents) == 0
    found = search(track(store))
    assert [d.page_content for d in found] == [d.page_content for d in untracked]
    assert len(PROVENANCE.documents) == 2


def test_a_tracked_store_is_the_same_object(store: InMemoryVectorStore) -> None:
    assert track(store) is store
    assert isinstance(store, InMemoryVectorStore)
    assert isinstance(store, VectorStore)
    kind = type(store)
    assert track(store) is store
    assert type(store) is kind
    assert (kind.__name__, kind.__module__) == (
        "InMemoryVectorStore",
        InMemoryVectorStore.__module__,
    )
    assert store.as_retriever(search_kwargs={"k": 1}).invoke(QUESTION)


def test_only_this_store_is_tracked(store: InMemoryVectorStore) -> None:
    other = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    other.add_documents([Document(DOCUMENTS[0])])
    track(store)
    other.similarity_search(QUESTION)
    assert len(PROVENANCE.documents) == 0


def test_a_store_goes_when_nobody_uses_it(store: InMemoryVectorStore) -> None:
    made = track(InMemoryVectorStore(DeterministicFakeEmbedding(size=8)))
    reference = weakref.ref(made)
    del made
    gc.collect()
    assert reference() is None


def test_a_copy_searches_its_own_documents(store: InMemoryVectorStore) -> None:
    for copied in (copy.deepcopy(track(store)), pickle.loads(pickle.dumps(track(store)))):
        assert type(copied) is InMemoryVectorStore
        copied.delete(list(copied.store))
        assert copied.similarity_search(QUESTION) == []
        assert len(store.similarity_search(QUESTION, k=2)) == 2


class Catalogue(BaseModel):
    """No vector store of LangChain's, and not built to be changed."""

    model_config = {"frozen": True}
    texts: list[str]

    def search(self, query: str) -> list[Document]:
        """Find everything."""
        return [Document(text) for text in self.texts]


def test_anything_that_can_be_searched_is_tracked() -> None:
    track(Catalogue(texts=list(DOCUMENTS))).search("anything")
    assert len(PROVENANCE.documents) == len(DOCUMENTS)


class AsyncCatalogue:
    """A store of a server's, which only answers those who wait."""

    async def asearch(self, query: str) -> list[Document]:
        """Find everything."""
        await asyncio.sleep(0)
        return [Document(text) for text in DOCUMENTS]


async def test_what_only_async_searches_find_is_known() -> None:
    assert len(await track(AsyncCatalogue()).asearch("anything")) == len(DOCUMENTS)
    assert len(PROVENANCE.documents) == len(DOCUMENTS)


@pytest.mark.parametrize(
    "nothing", [None, "store", object(), AnswerRetriever(), InMemoryVectorStore]
)
def test_what_can_not_be_searched_is_refused(nothing: Any) -> None:
    with pytest.raises(OptionError, match="track takes a vector store"):
        track(nothing)


def test_a_store_that_can_not_be_changed_is_refused_by_name() -> None:
    class Sealed:
        __slots__ = ()

        def search(self, query: str) -> list[Document]:
            return []

    sealed = Sealed()
    with pytest.raises(OptionError, match="Sealed can't be tracked"):
        track(sealed)
