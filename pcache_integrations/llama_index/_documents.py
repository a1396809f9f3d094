"""Encoding documents before a question needs them, and dropping what no question needs any more."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from llama_index.core.indices.base import BaseIndex
from llama_index.core.schema import BaseNode, NodeWithScore
from llama_index.core.storage.docstore.types import BaseDocumentStore

from pcache_core import EncodeReport, Prompt
from pcache_core.errors import OptionError
from pcache_integrations._engines import Engine
from pcache_integrations.llama_index._capture import Capture
from pcache_integrations.llama_index._known import Owner, Sweep, known_texts
from pcache_integrations.llama_index._sources import live_nodes, nodes_of, owner_of, shown_texts


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What `prune` or `release_doc` did.

    kept, dropped: texts of nodes that are still in use, and that are not. states: how many states
    of the dropped texts the store had; a text has one for every opening it was encoded behind.
    freed_bytes: by how much the store shrank, all tiers together; a server's share is not counted.
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


def encode_documents(
    engine: Engine, capture: Capture, documents: object, *, progress: bool
) -> EncodeReport:
    """Encode nodes, documents, texts, or all nodes of an index; see `cache_documents`."""
    known = known_texts(engine)
    texts = []
    for document in _listed(documents):
        texts.append(capture.add_document(document))
        node = document.node if isinstance(document, NodeWithScore) else document
        if isinstance(node, BaseNode):
            for text in (texts[-1], node.get_content().strip()):
                known.add(text, owner_of(node))
    return engine.encode([text for text in texts if text], progress=progress)


def note_documents(engine: Engine, capture: Capture, prompt: Prompt) -> Prompt:
    """Remember whose texts are in a prompt, which may leave states of them; return the prompt."""
    known = known_texts(engine)
    for segment in prompt.segments:
        if segment.kind == "document" and segment.name is not None:
            origin = capture.origin(segment.name)
            for text in (segment.text, origin.bare_text):
                known.add(text, Owner(segment.name, origin.document_id))
    return prompt


def release(engine: Engine, capture: Capture, document_id: str) -> PruneReport:
    """Drop the states of what only this document holds; see `release_doc`."""
    if not isinstance(document_id, str) or not document_id:
        raise OptionError(f"ref_doc_id must be a document's id, got {document_id!r}")
    return _apply(engine, capture, known_texts(engine).without_document(document_id))


def prune(engine: Engine, capture: Capture, sources: Sequence[object]) -> PruneReport:
    """Drop the states of nodes that are in none of the sources; see `PromptCacheLLM.prune`."""
    known = known_texts(engine)
    owners: defaultdict[str, set[Owner]] = defaultdict(set)
    texts_of: defaultdict[str, set[str]] = defaultdict(set)
    for node in live_nodes(sources, known):
        for text in shown_texts(node):
            owners[text].add(owner_of(node))
            texts_of[node.node_id].add(text)

    def still_own(text: str, before: Iterable[Owner]) -> Iterable[Owner]:
        if text in owners:
            return owners[text]
        # The beginning of a node that did not fit into its prompt.
        return [o for o in before if any(t.startswith(text) for t in texts_of.get(o.node_id, ()))]

    return _apply(engine, capture, known.with_owners(still_own))


def _apply(engine: Engine, capture: Capture, sweep: Sweep) -> PruneReport:
    """Drop the states first: if the store can't, nothing is forgotten and it can be tried again."""
    forgotten = engine.forget(sweep.dropped)
    capture.forget(sweep.dropped)
    known_texts(engine).apply(sweep)
    return PruneReport(len(sweep.kept), len(sweep.dropped), forgotten.states, forgotten.freed_bytes)


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
