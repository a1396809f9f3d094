"""What is known about prompts before they reach the model: plans of them, and retrieved nodes.

Everything is found again by content. A stream may be consumed long after its query returned, in
another thread, between other queries: what is looked up is the very text the model was handed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore

from pcache_core import Segment
from pcache_core.errors import OptionError
from pcache_core.prompt import SegmentKind
from pcache_integrations._mapping import ANCHOR_CHARS, DocumentIndex
from pcache_integrations.llama_index._templates import TemplateShelf

# Response synthesizers join the stripped texts of the nodes with this.
_SEPARATOR = "\n\n"

_V = TypeVar("_V")


def node_text(node: BaseNode) -> str:
    """The node's text as prompts hold it: with the metadata that is meant for the model."""
    return str(node.get_content(metadata_mode=MetadataMode.LLM)).strip()


@dataclass(frozen=True, slots=True)
class Origin:
    """The document that a node was cut from, itself if it was not, and its text alone."""

    document_id: str
    bare_text: str


@dataclass(frozen=True, slots=True)
class _Span:
    """Where a node's text stands in a joined context."""

    start: int
    end: int
    node_id: str


class Capture:
    """Plans and nodes, each at most as many as the limits say; the oldest are forgotten first.

    Thread-safe.
    """

    def __init__(
        self, max_plans: int = 512, max_contexts: int = 64, max_nodes: int = 100_000
    ) -> None:
        self.documents = DocumentIndex()
        self._origins: OrderedDict[str, Origin] = OrderedDict()
        self._plans: OrderedDict[str, Sequence[Segment]] = OrderedDict()
        self._contexts: OrderedDict[str, Sequence[_Span]] = OrderedDict()
        self._templates = TemplateShelf()
        self._max_plans = max_plans
        self._max_contexts = max_contexts
        self._max_nodes = max_nodes
        self._lock = threading.Lock()

    def add_plan(self, segments: Iterable[Segment]) -> None:
        """Remember how a text, soon to be handed to a model, is made up.

        An argument may be a whole prompt that was planned before: a wrapper formats a template,
        then hands the text to ours as a message, to be formatted again.
        """
        plan = [part for segment in segments for part in self._unfold(segment)]
        text = "".join(segment.text for segment in plan)
        with self._lock:
            _put(self._plans, text, tuple(plan), self._max_plans)

    def add_templates(self, sources: Iterable[str]) -> None:
        """Remember templates that somebody may format out of sight."""
        with self._lock:
            self._templates.add(sources)

    def add_nodes(self, nodes: Iterable[BaseNode]) -> None:
        """Remember nodes: as a synthesizer writes them, and their bare text."""
        for node in nodes:
            bare = str(node.get_content(metadata_mode=MetadataMode.NONE))
            self.documents.add(bare, node.node_id)
            self.documents.add(node_text(node), node.node_id)
            origin = Origin(node.ref_doc_id or node.node_id, bare.strip())
            with self._lock:
                _put(self._origins, node.node_id, origin, self._max_nodes)

    def origin(self, node_id: str) -> Origin:
        """Where a node came from; from itself if it is not known."""
        with self._lock:
            return self._origins.get(node_id) or Origin(node_id, "")

    def forget(self, texts: Collection[str]) -> None:
        """Forget documents, and every plan and context that holds one of them."""
        gone = DocumentIndex()
        for text in texts:
            self.documents.remove(text)
            gone.add(text)
        with self._lock:
            remembered = [*self._plans, *self._contexts]
        holding = [held for held in remembered if _holds_document(gone, held)]
        with self._lock:
            for held in holding:
                self._plans.pop(held, None)
                self._contexts.pop(held, None)
            for node_id in [n for n, origin in self._origins.items() if origin.bare_text in texts]:
                del self._origins[node_id]

    def add_document(self, document: object) -> str:
        """Remember a node, with or without its score, or a text; return what prompts hold of it.

        Raises: OptionError: it is something else.
        """
        node = document.node if isinstance(document, NodeWithScore) else document
        if isinstance(node, str):
            self.documents.add(node)
            return node.strip()
        if isinstance(node, BaseNode):
            self.add_nodes([node])
            return node_text(node)
        raise OptionError(
            f"a document must be a LlamaIndex node or document or a string, got "
            f"{type(document).__name__}"
        )

    def add_context(self, nodes: Iterable[BaseNode]) -> None:
        """Remember the nodes of one answer, in their order.

        A context too long for the model is cut anywhere, but each chunk is a stretch of the joined
        texts, and so shows which parts of which nodes it holds.
        """
        spans: list[_Span] = []
        texts: list[str] = []
        start = 0
        for node in nodes:
            if text := node_text(node):
                spans.append(_Span(start, start + len(text), node.node_id))
                texts.append(text)
                start += len(text) + len(_SEPARATOR)
        with self._lock:
            _put(self._contexts, _SEPARATOR.join(texts), tuple(spans), self._max_contexts)

    def segments(self, text: str, kind: SegmentKind) -> list[Segment]:
        """Cut a text that the model is handed, by its plan or its template, then at its nodes.

        kind: of a text that has neither.
        Returns: segments whose texts join to `text`.
        """
        pieces = self._plan(text) or self._reading(text) or [Segment(text, kind)]
        return [segment for piece in pieces for segment in self._find_nodes(piece)]

    def _plan(self, text: str) -> Sequence[Segment]:
        with self._lock:
            return self._plans.get(text, ())

    def _reading(self, text: str) -> Sequence[Segment]:
        with self._lock:
            return self._templates.read(text)

    def _unfold(self, segment: Segment) -> Sequence[Segment]:
        plan = self._plan(segment.text) if segment.kind == "argument" else ()
        return plan if len(plan) > 1 else (segment,)

    def _find_nodes(self, piece: Segment) -> Iterator[Segment]:
        located = self._locate(piece.text) if piece.kind == "argument" else None
        for part in _cut(piece, *located) if located else (piece,):
            if part.kind == "document":
                yield part
            else:
                yield from self.documents.split(part.text, part.kind, part.name)

    def _locate(self, text: str) -> tuple[Sequence[_Span], int] | None:
        """The context that `text` is a stretch of, and where it starts there; newest first."""
        if len(text) < ANCHOR_CHARS:
            return None
        with self._lock:
            contexts = list(reversed(self._contexts.items()))
        for joined, spans in contexts:
            at = joined.find(text)
            if at >= 0:
                return spans, at
        return None


def _cut(piece: Segment, spans: Sequence[_Span], at: int) -> list[Segment]:
    """Cut a stretch, which starts at `at`, along the spans.

    A node cut off at its end is still a document: its beginning. The rest of a node whose beginning
    is elsewhere is not, for its state would depend on what it lacks.
    """
    segments: list[Segment] = []
    position = 0
    for span in spans:
        start, end = span.start - at, min(span.end - at, len(piece.text))
        cut_off = span.end - at > len(piece.text)
        if start < 0 or end <= start or (cut_off and end - start < ANCHOR_CHARS):
            continue
        segments.append(Segment(piece.text[position:start], piece.kind, piece.name))
        segments.append(Segment(piece.text[start:end], "document", span.node_id))
        position = end
    segments.append(Segment(piece.text[position:], piece.kind, piece.name))
    return [segment for segment in segments if segment.text]


def _holds_document(index: DocumentIndex, text: str) -> bool:
    return any(segment.kind == "document" for segment in index.split(text, "text"))


def _put(entries: OrderedDict[str, _V], key: str, value: _V, limit: int) -> None:
    entries[key] = value
    entries.move_to_end(key)
    while len(entries) > limit:
        entries.popitem(last=False)


# One for the process, because LlamaIndex's event handlers are the process's too.
CAPTURE = Capture()
