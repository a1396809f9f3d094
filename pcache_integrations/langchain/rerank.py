"""Re-ranking retrieved documents by the attention that a question pays to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from langchain_core.callbacks import Callbacks
from langchain_core.documents import Document
from langchain_core.documents.compressor import BaseDocumentCompressor
from pydantic import ConfigDict, Field

from pcache_integrations.langchain.chat import ChatPromptCache
from pcache_integrations.langchain.llm import PromptCacheLLM


class PromptCacheReranker(BaseDocumentCompressor):
    """Keeps the documents that the question attends to most, the first one the best.

    llm: whose model reads the question. Its states of the documents serve prompts as well.
    top_n: how many documents to keep.

    For `ContextualCompressionRetriever` and wherever a document compressor fits. Each document that
    is kept has its `relevance_score` in its metadata: see `PromptCacheEngine.rank`.

    ```python
    from langchain_classic.retrievers import ContextualCompressionRetriever

    retriever = ContextualCompressionRetriever(
        base_compressor=PromptCacheReranker(llm=llm, top_n=4), base_retriever=retriever
    )
    ```
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    llm: PromptCacheLLM | ChatPromptCache
    top_n: int = Field(default=4, ge=1)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Rank documents for a question and return the first `top_n`.

        Raises: ModelError: the model's attention can't be observed. ContextLengthError: a document
            is longer than the context.
        """
        if not documents:
            return []
        texts = [document.page_content.strip() for document in documents]
        scores = self.llm.engine.rank(query, texts)
        order = sorted(range(len(documents)), key=scores.__getitem__, reverse=True)[: self.top_n]
        return [_scored(documents[index], scores[index]) for index in order]


def _scored(document: Document, score: float) -> Document:
    return document.model_copy(update={"metadata": {**document.metadata, "relevance_score": score}})
