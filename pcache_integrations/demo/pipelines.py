"""The question-answering pipelines a user would write, one for each framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.prompts import PromptTemplate
from langchain_core.retrievers import BaseRetriever as LangChainBase
from langchain_core.runnables import RunnablePassthrough
from llama_index.core import PromptTemplate as LlamaIndexTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever as LlamaIndexBase
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from pcache_core import EncodeReport, PromptCacheEngine, Report
from pcache_core.params import DEFAULT_REUSE, ReuseMode
from pcache_integrations.demo.corpus import Corpus
from pcache_integrations.langchain import PromptCacheLLM as LangChainLLM
from pcache_integrations.llama_index import PromptCacheLLM as LlamaIndexLLM

OPENING = "Answer the question from the documents.\n\n"
MAX_TOKENS = 24
STOP = ["\n"]

Engines = Mapping[ReuseMode, PromptCacheEngine]
"""One for each mode, over one store: none continues what another has just read."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A framework's way from a question to an answer.

    cache: encodes the whole corpus. answer: question and reuse mode to the answer's text.
    """

    name: str
    engines: Engines
    cache: Callable[[], EncodeReport]
    answer: Callable[[str, ReuseMode], str]

    def ask(self, question: str, mode: ReuseMode) -> tuple[str, Report]:
        """Return the answer, and the report of its request."""
        return self.answer(question, mode).strip(), self.engines[mode].reports[-1]


def langchain_pipeline(engines: Engines, corpus: Corpus, top_k: int) -> Pipeline:
    """Build `retriever | template | llm`, as in LangChain's own tutorials."""

    class DocumentRetriever(LangChainBase):
        def _get_relevant_documents(
            self, query: str, *, run_manager: CallbackManagerForRetrieverRun
        ) -> list[Document]:
            return [Document(d.text, id=d.name) for d in corpus.search(query, top_k)]

    template = PromptTemplate.from_template(OPENING + "{context}\n\nQuestion: {question}\nAnswer:")
    context = DocumentRetriever() | (lambda found: "\n\n".join(d.page_content for d in found))
    llms = {
        mode: LangChainLLM(engine=engine, reuse=mode, max_tokens=MAX_TOKENS, stop=STOP)
        for mode, engine in engines.items()
    }

    def answer(question: str, mode: ReuseMode) -> str:
        chain = {"context": context, "question": RunnablePassthrough()} | template | llms[mode]
        return str(chain.invoke(question))

    documents = [Document(document.text, id=document.name) for document in corpus.documents]
    llm = llms[DEFAULT_REUSE]
    return Pipeline("LangChain", engines, lambda: llm.cache_documents(documents), answer)


def llama_index_pipeline(engines: Engines, corpus: Corpus, top_k: int) -> Pipeline:
    """Build a query engine over a retriever, as `index.as_query_engine()` builds one."""
    nodes = {d.name: TextNode(text=d.text, id_=d.name) for d in corpus.documents}

    class NodeRetriever(LlamaIndexBase):
        def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            found = corpus.search(query_bundle.query_str, top_k)
            return [NodeWithScore(node=nodes[document.name], score=1.0) for document in found]

    template = LlamaIndexTemplate(OPENING + "{context_str}\n\nQuestion: {query_str}\nAnswer:")
    llms = {
        mode: LlamaIndexLLM(engine=engine, reuse=mode, max_tokens=MAX_TOKENS, stop=STOP)
        for mode, engine in engines.items()
    }

    def answer(question: str, mode: ReuseMode) -> str:
        query_engine = RetrieverQueryEngine.from_args(
            NodeRetriever(), llm=llms[mode], text_qa_template=template
        )
        return str(query_engine.query(question))

    llm = llms[DEFAULT_REUSE]
    return Pipeline("LlamaIndex", engines, lambda: llm.cache_documents(nodes.values()), answer)
