"""States and texts of nodes that are gone: nobody says so, `prune` finds out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import (
    DocumentSummaryIndex,
    SimpleKeywordTableIndex,
    StorageContext,
    SummaryIndex,
    VectorStoreIndex,
)
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.indices.base import BaseIndex
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import (
    HierarchicalNodeParser,
    SentenceSplitter,
    SentenceWindowNodeParser,
    get_leaf_nodes,
)
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.response_synthesizers import TreeSummarize
from llama_index.core.schema import (
    BaseNode,
    Document,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore

from corpus import DOCUMENTS
from pcache_core import MemoryStore, OptionError, PromptCacheEngine, Segment, StoreError
from pcache_integrations._engines import load_lm
from pcache_integrations.llama_index import PromptCacheLLM

pytestmark = pytest.mark.usefixtures("closed_loops")

EMBEDDING = MockEmbedding(embed_dim=2)


@pytest.fixture
def llm() -> PromptCacheLLM:
    return PromptCacheLLM(
        engine=PromptCacheEngine(load_lm("builtin:tiny-rag")), max_tokens=2, reuse="fast"
    )


def node(text: str, document: str, node_id: str) -> TextNode:
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document)}
    return TextNode(text=text, id_=node_id, relationships=source, metadata={"file": "x.txt"})


def nodes() -> list[TextNode]:
    """Eight nodes of four documents, two each; the last document has a text of the first's."""
    numbered = [node(t, f"doc{i // 2}", f"n{i}") for i, t in enumerate(DOCUMENTS)]
    numbered[7] = node(DOCUMENTS[0], "doc3", "n7")
    return numbered


def index_of(some: list[TextNode], **options: Any) -> VectorStoreIndex:
    return VectorStoreIndex(some, embed_model=EMBEDDING, **options)


def stored(llm: PromptCacheLLM, *some: BaseNode) -> list[bool]:
    """Whether the store has each node's text: both of its states or none."""
    store = llm.engine.store
    assert isinstance(store, MemoryStore)
    held = [key.token_ids for key in store.held_keys()]
    ids = llm.engine.lm.text.ids
    texts = [n.get_content(MetadataMode.LLM).strip() for n in some]
    counts = [held.count(tuple(ids(Segment(text, "document")))) for text in texts]
    assert set(counts) <= {0, 2}
    return [count == 2 for count in counts]


def _fail(texts: object) -> None:
    raise StoreError("the folder can't be read")


class TestPrune:
    @pytest.mark.parametrize("from_docstore", [False, True])
    def test_after_a_document_was_deleted(self, llm: PromptCacheLLM, from_docstore: bool) -> None:
        index = index_of(nodes())
        llm.cache_documents(index, progress=False)
        assert llm.prune(index).dropped == 0
        index.delete_ref_doc("doc1", delete_from_docstore=from_docstore)
        report = llm.prune(index)
        assert (report.states, report.dropped) == (2 * 2, 4)  # texts with metadata and bare
        assert stored(llm, *nodes()) == [True, True, False, False, True, True, True, True]
        assert llm.prune(index).dropped == 0

    def test_a_text_that_another_document_has_stays(self, llm: PromptCacheLLM) -> None:
        index = index_of(nodes())
        llm.cache_documents(index, progress=False)
        before = llm.engine.stats().nbytes
        index.delete_ref_doc("doc0")  # n0, whose text doc3 has as well, and n1
        report = llm.prune(index)
        assert (report.states, report.dropped, report.kept) == (2, 2, 12)  # bare texts, too
        assert before is not None
        assert report.freed_bytes == before - (llm.engine.stats().nbytes or 0) > 0
        assert str(report) == f"12 texts kept, 2 dropped: 2 states, {report.freed_bytes:,} bytes"
        assert stored(llm, *nodes()[:3]) == [True, False, True]
        index.delete_ref_doc("doc3")
        assert llm.prune(index).states == 4  # the text is nobody else's any more

    def test_nodes_that_were_only_asked_about_are_known(self, llm: PromptCacheLLM) -> None:
        index = index_of(nodes())
        index.as_query_engine(llm=llm, similarity_top_k=8).query("Who?")
        index.delete_ref_doc("doc1")
        assert llm.prune(index).states == 2

    def test_plain_texts_and_other_engines_are_left_alone(self, llm: PromptCacheLLM) -> None:
        index = index_of(nodes()[:4])
        other = PromptCacheLLM(engine=PromptCacheEngine(llm.engine.lm), max_tokens=1)
        for model in (llm, other):
            model.cache_documents([*nodes()[:4], "A text of its own, and long."], progress=False)
        index.delete_ref_doc("doc1")
        assert llm.prune(index).states == 4
        assert stored(other, *nodes()[:4]) == [True] * 4
        assert llm.cache_documents(["A text of its own, and long."]).already_stored == 1

    def test_objects_that_share_an_engine_know_the_same(self, llm: PromptCacheLLM) -> None:
        llm.cache_documents(nodes()[:4], progress=False)
        assert PromptCacheLLM(engine=llm.engine).prune(nodes()[:2]).states == 4

    def test_what_is_pruned_is_not_recognised_any_more(self, llm: PromptCacheLLM) -> None:
        fact = node("The weir at Prunewater was blown up by a beaver named Otto.", "doc", "n")
        llm.cache_documents([fact, *nodes()[:2]], progress=False)
        asked = f"{fact.get_content(MetadataMode.LLM)}\nWho?"
        for kinds in (["document", "text"], ["text"]):
            llm.complete(asked)
            assert [s.kind for s in llm.engine.reports[-1].segments] == kinds
            llm.prune(nodes()[:2])

    def test_if_the_store_fails_nothing_is_forgotten(
        self, llm: PromptCacheLLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        llm.cache_documents(nodes(), progress=False)
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine, "forget", _fail)
            with pytest.raises(StoreError):
                llm.prune(nodes()[:2])
        assert llm.prune(nodes()[:2]).states == 10

    def test_what_an_index_deleted_may_be_in_another(self, llm: PromptCacheLLM) -> None:
        first, second = index_of(nodes()[:4]), index_of(nodes()[2:6])
        llm.cache_documents(nodes(), progress=False)
        first.delete_ref_doc("doc1")
        llm.prune(first, second)
        assert stored(llm, *nodes()[:7]) == [True] * 6 + [False]

    def test_an_upsert_under_the_same_ids_leaves_the_old_text(self, llm: PromptCacheLLM) -> None:
        index = index_of(nodes()[:2])
        llm.cache_documents(index, progress=False)
        index.as_query_engine(llm=llm).query("Who?")
        new = node("Rhea Thaswright has moved away and nobody knows where to.", "doc0", "n0")
        index.delete_nodes(["n0"], delete_from_docstore=True)
        index.insert_nodes([new])
        llm.prune(index)
        assert stored(llm, nodes()[0], nodes()[1]) == [False, True]
        index.as_query_engine(llm=llm).query("Who?")
        assert llm.prune(index).dropped == 0

    def test_a_pipelines_upsert(self, llm: PromptCacheLLM) -> None:
        documents = [Document(text=t, id_=f"doc{i}") for i, t in enumerate(DOCUMENTS[:3])]
        steps = IngestionPipeline(
            transformations=[SentenceSplitter(), EMBEDDING],
            docstore=SimpleDocumentStore(),
            vector_store=SimpleVectorStore(),
        )
        index = index_of(list(steps.run(documents=documents)))
        llm.cache_documents(index, progress=False)
        documents[1].set_content(DOCUMENTS[7])
        index.delete_ref_doc("doc1", delete_from_docstore=True)
        index.insert_nodes(steps.run(documents=documents))
        assert llm.prune(index).states == 2
        inputs = SimpleDocumentStore()
        inputs.add_documents([Document(text=" ".join(DOCUMENTS[:3]))])
        with pytest.raises(OptionError, match="holds none of the nodes that this LLM has met"):
            llm.prune(inputs)
        with pytest.raises(OptionError, match="IngestionPipeline keeps the documents that went in"):
            llm.prune(steps)  # type: ignore[arg-type]

    def test_a_new_index_over_the_same_texts_keeps_them(self, llm: PromptCacheLLM) -> None:
        llm.cache_documents(nodes(), progress=False)
        again = [node(n.text, n.ref_doc_id or "", f"new{n.node_id}") for n in nodes()]
        assert llm.prune(index_of(again)).states == 0
        assert stored(llm, *nodes()) == [True] * 8

    def test_document_stores_and_lists_say_what_is_in_use(self, llm: PromptCacheLLM) -> None:
        docstore = SimpleDocumentStore()
        docstore.add_documents(nodes()[:4])
        llm.cache_documents(nodes(), progress=False)
        scored = [NodeWithScore(node=n) for n in nodes()[4:6]]
        llm.prune(docstore, scored)
        assert stored(llm, *nodes()[:7]) == [True] * 6 + [False]

    def test_the_last_document_may_go(self, llm: PromptCacheLLM) -> None:
        index = index_of(nodes()[:2])
        llm.cache_documents(index, progress=False)
        index.delete_ref_doc("doc0")
        assert llm.prune(index).states == 4

    @pytest.mark.parametrize("kind", [SummaryIndex, SimpleKeywordTableIndex, DocumentSummaryIndex])
    def test_other_kinds_of_index(self, llm: PromptCacheLLM, kind: type[BaseIndex[Any]]) -> None:
        options: dict[str, Any] = {} if kind is SummaryIndex else {"llm": llm}
        if kind is DocumentSummaryIndex:
            options |= {"embed_model": EMBEDDING, "embed_summaries": False}
        index = kind(nodes()[:4], **options)
        llm.cache_documents(nodes()[:4], progress=False)
        assert llm.prune(index).states == 0
        index.delete_ref_doc("doc0")
        llm.prune(index)
        assert stored(llm, *nodes()[:4]) == [False, False, True, True]

    def test_the_sentences_around_a_node_are_in_use(self, llm: PromptCacheLLM) -> None:
        parser = SentenceWindowNodeParser.from_defaults(window_size=1)
        windows = parser.get_nodes_from_documents([Document(text=DOCUMENTS[7], id_="doc")])
        index = index_of(windows)  # type: ignore[arg-type]
        engine = index.as_query_engine(
            llm=llm,
            similarity_top_k=3,
            node_postprocessors=[MetadataReplacementPostProcessor("window")],
        )
        engine.query("Where?")
        read = [s.text for s in llm.engine.reports[-1].segments if s.kind == "document"]
        assert max(map(len, read)) > max(len(n.get_content()) for n in windows)
        assert llm.prune(index).dropped == 0
        assert llm.prune(nodes()[:1]).states == len(read)

    def test_what_a_node_is_a_part_of_is_in_use(self, llm: PromptCacheLLM) -> None:
        parser = HierarchicalNodeParser.from_defaults(chunk_sizes=[128, 32], chunk_overlap=0)
        every = parser.get_nodes_from_documents([Document(text=" ".join(DOCUMENTS))])
        docstore = SimpleDocumentStore()
        docstore.add_documents(every)
        leaves = get_leaf_nodes(every)
        stores = StorageContext.from_defaults(docstore=docstore)
        index = index_of(leaves, storage_context=stores)  # type: ignore[arg-type]
        llm.cache_documents(every, progress=False)
        assert len(leaves) < len(every)
        assert llm.prune(index).dropped == 0

    def test_the_beginning_of_a_split_node_goes_with_it(self, llm: PromptCacheLLM) -> None:
        entries = " ".join(f"Entry {i} of the long ledger: nothing was sold." for i in range(40))
        long = node(entries, "long", "n0")
        index = index_of([long])
        small = PromptHelper(num_output=2, chunk_size_limit=60)
        synthesizer = TreeSummarize(llm, prompt_helper=small)
        index.as_query_engine(llm=llm, response_synthesizer=synthesizer).query("Who?")
        cut = {s.text for r in llm.engine.reports for s in r.segments if s.name == "n0"}
        whole = long.get_content(MetadataMode.LLM)
        assert cut
        assert all(len(text) < len(whole) for text in cut)
        assert llm.prune(index).dropped == 0
        index.delete_ref_doc("long")
        assert llm.prune(index).states == len(cut)


class VectorsWithText(SimpleVectorStore):
    """As remote stores do, it keeps the nodes itself."""

    stores_text: bool = True


class TestWhatSaysNothingOfWhatIsInUse:
    @pytest.fixture(autouse=True)
    def cached(self, llm: PromptCacheLLM) -> Iterator[None]:
        llm.cache_documents(nodes(), progress=False)
        yield
        assert stored(llm, *nodes()) == [True] * 8

    def test_nothing(self, llm: PromptCacheLLM) -> None:
        with pytest.raises(OptionError, match="give every index that this LLM answers from"):
            llm.prune()

    def test_empty_lists_and_document_stores(self, llm: PromptCacheLLM) -> None:
        for empty in ([], SimpleDocumentStore()):
            with pytest.raises(OptionError, match="holds no nodes, so that every state would be"):
                llm.prune(empty)

    def test_an_index_over_a_store_that_keeps_the_nodes(self, llm: PromptCacheLLM) -> None:
        index = VectorStoreIndex.from_vector_store(VectorsWithText(), embed_model=EMBEDDING)
        for call in (llm.prune, llm.cache_documents):
            with pytest.raises(OptionError, match="in its VectorsWithText alone"):
                call(index)

    def test_an_index_whose_document_store_was_not_loaded(self, llm: PromptCacheLLM) -> None:
        index = index_of(nodes())
        lost = VectorStoreIndex(index_struct=index.index_struct, embed_model=EMBEDDING)
        with pytest.raises(OptionError, match="holds none of its nodes"):
            llm.prune(lost)

    def test_a_good_source_beside_a_bad_one(self, llm: PromptCacheLLM) -> None:
        with pytest.raises(OptionError):
            llm.prune(index_of(nodes()[:2]), SimpleDocumentStore())

    @pytest.mark.parametrize("wrong", ["doc0", 3, None, nodes()[0], [nodes()[0], "text"]])
    def test_other_things(self, llm: PromptCacheLLM, wrong: Any) -> None:
        with pytest.raises(OptionError, match="list of nodes is needed, got"):
            llm.prune(wrong)


def test_a_store_that_keeps_the_nodes_beside_copies_is_believed(llm: PromptCacheLLM) -> None:
    stores = StorageContext.from_defaults(vector_store=VectorsWithText())
    index = index_of(nodes()[:4], storage_context=stores, store_nodes_override=True)
    llm.cache_documents(index, progress=False)
    index.delete_ref_doc("doc1")
    assert llm.prune(index).states == 4


def test_in_a_folder_after_a_restart(tmp_path: Path) -> None:
    def start() -> PromptCacheLLM:
        return PromptCacheLLM(model="builtin:tiny-rag", store=str(tmp_path), max_tokens=1)

    index = index_of(nodes())
    first = start()
    index.as_query_engine(llm=first, similarity_top_k=8).query("Who?")
    first.cache_documents(index, progress=False)
    first.close()
    second = start()
    index.delete_ref_doc("doc1")
    assert second.prune(index).dropped == 0  # it was told of nothing yet
    second.cache_documents(nodes(), progress=False)
    assert second.prune(index).states == 2 * 2
