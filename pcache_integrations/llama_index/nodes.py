"""The nodes that an index holds: encoding them before a question, dropping what is gone."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from llama_index.core.data_structs.data_structs import (
    IndexDict,
    IndexGraph,
    IndexList,
    IndexStruct,
    KeywordTable,
)
from llama_index.core.data_structs.document_summary import IndexDocumentSummary
from llama_index.core.indices.base import BaseIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import BaseNode, NodeWithScore
from llama_index.core.storage.docstore.types import BaseDocumentStore

from pcache_core import EncodeReport, Prompt
from pcache_core.base_engine import Engine
from pcache_core.errors import OptionError
from pcache_integrations.llama_index.watch import DOCUMENTS, node_text, remember

Source = BaseIndex[IndexStruct] | BaseDocumentStore | Iterable[BaseNode | NodeWithScore]


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What `prune` did.

    kept, dropped: texts that are still in use, and that are not. states: how many states of the
    dropped texts the store had. freed_bytes: by how much the store shrank, all tiers together; a
    server's share is not counted.
    """

    kept: int
    dropped: int
    states: int
    freed_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.kept} texts kept, {self.dropped} dropped: {self.states} states, "
            f"{self.freed_bytes:,} bytes"
        )


class _Given:
    """Texts of nodes that an engine was given, the latest last. Bounded, thread-safe."""

    def __init__(self, max_texts: int = 200_000) -> None:
        self._texts: dict[str, None] = {}
        self._max_texts = max_texts
        self._lock = threading.Lock()

    def __contains__(self, text: object) -> bool:
        return text in self._texts

    def add(self, text: str) -> None:
        with self._lock:
            self._texts.pop(text, None)
            self._texts[text] = None
            if len(self._texts) > self._max_texts:
                del self._texts[next(iter(self._texts))]

    def remove(self, texts: Iterable[str]) -> None:
        with self._lock:
            for text in texts:
                self._texts.pop(text, None)

    def all(self) -> list[str]:
        with self._lock:
            return list(self._texts)


_given: WeakKeyDictionary[Engine, _Given] = WeakKeyDictionary()
_lock = threading.Lock()


def given_to(engine: Engine) -> _Given:
    """The nodes' texts that an engine was given, through all language models that share it."""
    with _lock:
        return _given.setdefault(engine, _Given())


def encode_documents(engine: Engine, documents: object, *, progress: bool) -> EncodeReport:
    """Encode nodes, documents, texts, or all nodes of an index; see `cache_documents`."""
    texts = [_noted(engine, document) for document in _listed(documents)]
    return engine.encode([text for text in texts if text], progress=progress)


def note_documents(engine: Engine, prompt: Prompt) -> Prompt:
    """Remember which nodes' texts are in a prompt, which may leave states; return the prompt."""
    for segment in prompt.segments:
        if segment.kind == "document" and segment.name is not None:
            given_to(engine).add(segment.text)
    return prompt


def prune(engine: Engine, sources: Sequence[object]) -> PruneReport:
    """Drop the states of nodes that are in none of the sources; see `PromptCacheLLM.prune`."""
    given = given_to(engine)
    known = given.all()
    live = sorted({text for node in _live_nodes(sources, known) for text in _shown_texts(node)})
    gone = [text for text in known if not _begins_one(live, text)]
    forgotten = engine.forget(gone)  # first: if the store can't, nothing is forgotten
    given.remove(gone)
    for text in gone:
        DOCUMENTS.remove(text)
    return PruneReport(len(known) - len(gone), len(gone), forgotten.states, forgotten.freed_bytes)


def _begins_one(live: Sequence[str], text: str) -> bool:
    """Return whether one of the sorted texts is `text`, or begins with it.

    A node that did not fit into its prompt left a state of its beginning.
    """
    at = bisect_left(live, text)
    return at < len(live) and live[at].startswith(text)


def nodes_of(source: object) -> Sequence[BaseNode]:
    """Return the nodes of an index or a document store, or those that are listed.

    An index has the nodes that can be retrieved from it, and their ancestors.

    Raises: OptionError: it is none of them; the index's nodes are only in its vector store.
    """
    if isinstance(source, BaseIndex):
        return _nodes_of_index(source)
    if isinstance(source, BaseDocumentStore):
        return list(source.docs.values())
    if isinstance(source, IngestionPipeline):
        raise OptionError(
            "an IngestionPipeline keeps the documents that went in, not the nodes that came out; "
            "give the index, or the nodes that run() returned"
        )
    if isinstance(source, Iterable) and not isinstance(source, (str, BaseNode, NodeWithScore)):
        return [_as_node(item) for item in source]
    raise OptionError(
        f"an index, a document store or a list of nodes is needed, got {type(source).__name__}"
    )


def _noted(engine: Engine, document: object) -> str:
    """Remember a document; return its text as prompts hold it."""
    node = document.node if isinstance(document, NodeWithScore) else document
    if isinstance(node, str):
        DOCUMENTS.add(node)
        return node.strip()
    if not isinstance(node, BaseNode):
        raise OptionError(
            f"a document must be a LlamaIndex node or document or a string, got "
            f"{type(document).__name__}"
        )
    remember([node])
    text = node_text(node)
    for own in filter(None, (text, node.get_content().strip())):
        given_to(engine).add(own)
    return text


def _listed(documents: object) -> Collection[object]:
    if isinstance(documents, (BaseIndex, BaseDocumentStore)):
        return nodes_of(documents)
    if isinstance(documents, Iterable) and not isinstance(
        documents, (str, BaseNode, NodeWithScore)
    ):
        return list(documents)
    raise OptionError(
        f"cache_documents takes several documents, got one {type(documents).__name__}; "
        "put it in a list"
    )


def _live_nodes(sources: Sequence[object], known: Collection[str]) -> Iterator[BaseNode]:
    """Yield the nodes of all sources, where that can be trusted to be all there are.

    known: texts of nodes that the engine was given.
    Raises: OptionError: a source that is none, or that says nothing of what is in use: an empty
        one, or the document store of an ingestion pipeline.
    """
    if not sources:
        raise OptionError("say what is still in use: give every index that this LLM answers from")
    for source in sources:
        nodes = nodes_of(source)
        if not nodes and not isinstance(source, BaseIndex):
            raise OptionError(
                f"the {type(source).__name__} holds no nodes, so that every state would be "
                "dropped; if a vector store keeps the nodes, give them as a list"
            )
        if isinstance(source, BaseDocumentStore) and not any(node.ref_doc_id for node in nodes):
            _check_holds_nodes(source, nodes, known)
        yield from nodes


def _check_holds_nodes(
    docstore: BaseDocumentStore, nodes: Sequence[BaseNode], known: Collection[str]
) -> None:
    """Raises: OptionError: it holds what nodes were cut from, and none of them."""
    if known and set(known).isdisjoint(text for node in nodes for text in _shown_texts(node)):
        raise OptionError(
            f"the {type(docstore).__name__} holds none of the nodes that this LLM has met, only "
            f"{len(nodes)} documents: an ingestion pipeline's holds what went in, not the nodes "
            "that came out; give the index, or the nodes as a list"
        )


def _nodes_of_index(index: BaseIndex[IndexStruct]) -> list[BaseNode]:
    store = getattr(index, "vector_store", None)
    # Set by store_nodes_override=True; there is no public name for it.
    keeps_copies = getattr(index, "_store_nodes_override", False)
    if getattr(store, "stores_text", False) and not keeps_copies:
        raise OptionError(
            f"the index's nodes are in its {type(store).__name__} alone, which can't list them; "
            "give the nodes as a list"
        )
    node_ids, stored = _node_ids(index.index_struct), index.docstore.docs
    found = list(stored.values() if node_ids is None else _with_ancestors(node_ids, stored))
    if not found and node_ids != set():
        raise OptionError(
            f"the document store of the {type(index).__name__} holds none of its nodes; "
            "give the nodes as a list"
        )
    return found


def _node_ids(struct: IndexStruct) -> set[str] | None:
    """Ids of what an index finds; None for kinds of index that don't say."""
    match struct:
        case IndexDict():
            return set(struct.nodes_dict.values())
        case IndexList():
            return set(struct.nodes)
        case IndexGraph():
            return set(struct.all_nodes.values())
        case KeywordTable():
            return set(struct.node_ids)
        case IndexDocumentSummary():
            return {*struct.doc_id_to_summary_id.values(), *struct.node_id_to_summary_id}
    return None


def _with_ancestors(node_ids: Iterable[str], stored: Mapping[str, BaseNode]) -> Iterator[BaseNode]:
    """Nodes by id, and those that they are parts of: some retrievers give the whole instead."""
    waiting, seen = list(node_ids), set[str]()
    while waiting:
        node = stored.get(waiting.pop())
        if node is None or node.node_id in seen:
            continue
        seen.add(node.node_id)
        yield node
        if node.parent_node is not None:
            waiting.append(node.parent_node.node_id)


def _as_node(item: object) -> BaseNode:
    node = item.node if isinstance(item, NodeWithScore) else item
    if not isinstance(node, BaseNode):
        raise OptionError(f"a list of nodes is needed, got one with a {type(node).__name__}")
    return node


def _shown_texts(node: BaseNode) -> Iterator[str]:
    """What prompts may hold of a node: with its metadata, bare, or a text that it carries along.

    Postprocessors put a longer text from the metadata in the place of the node's own, such as the
    sentences around it; such entries are kept from the model where they are.
    """
    yield node_text(node)
    yield node.get_content().strip()
    hidden = getattr(node, "excluded_llm_metadata_keys", ())
    for key in hidden:
        value = node.metadata.get(key)
        if isinstance(value, str) and value.strip():
            replaced = node.model_copy()
            replaced.set_content(value)
            yield node_text(replaced)
