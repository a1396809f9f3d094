"""The nodes that an index, a document store or a list holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

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

from pcache_core.errors import OptionError
from pcache_integrations.llama_index._capture import node_text
from pcache_integrations.llama_index._known import KnownTexts, Owner

Source = BaseIndex[IndexStruct] | BaseDocumentStore | Iterable[BaseNode | NodeWithScore]


def owner_of(node: BaseNode) -> Owner:
    """The node as an owner of its texts."""
    return Owner(node.node_id, node.ref_doc_id or node.node_id)


def nodes_of(source: object) -> Sequence[BaseNode]:
    """The nodes of an index or a document store, or those that are listed.

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


def live_nodes(sources: Sequence[object], known: KnownTexts) -> list[BaseNode]:
    """The nodes of all sources, where that can be trusted to be all there are.

    Raises: OptionError: a source that is none, or that says nothing of what is in use: an empty
        one, or the document store of an ingestion pipeline.
    """
    if not sources:
        raise OptionError("say what is still in use: give every index that this LLM answers from")
    found: list[BaseNode] = []
    for source in sources:
        nodes = nodes_of(source)
        if not nodes and not isinstance(source, BaseIndex):
            raise OptionError(
                f"the {type(source).__name__} holds no nodes, so that every state would be "
                "dropped; if a vector store keeps the nodes, give them as a list"
            )
        if isinstance(source, BaseDocumentStore):
            _check_holds_nodes(source, nodes, known)
        found.extend(nodes)
    return found


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


def _check_holds_nodes(
    docstore: BaseDocumentStore, nodes: Sequence[BaseNode], known: KnownTexts
) -> None:
    """Raises: OptionError: it holds what nodes were cut from, and none of them."""
    if len(known) == 0 or any(node.ref_doc_id for node in nodes):
        return
    if known.node_ids().isdisjoint(node.node_id for node in nodes):
        raise OptionError(
            f"the {type(docstore).__name__} holds none of the nodes that this LLM has met, only "
            f"{len(nodes)} documents: an ingestion pipeline's holds what went in, not the nodes "
            "that came out; give the index, or the nodes as a list"
        )


def _as_node(item: object) -> BaseNode:
    node = item.node if isinstance(item, NodeWithScore) else item
    if not isinstance(node, BaseNode):
        raise OptionError(f"a list of nodes is needed, got one with a {type(node).__name__}")
    return node


def shown_texts(node: BaseNode) -> Iterator[str]:
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
