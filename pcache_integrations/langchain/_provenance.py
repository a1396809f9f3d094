"""Where the parts of a prompt come from, learnt by watching the chain around the model.

One callback handler, installed once per process, sees retrieved documents and rendered templates.
Both are remembered by content, so nothing has to travel from the retriever to the model: whatever
threads, tasks or wrappers lie between, the model finds its prompt's parts by the prompt's text.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.messages import ToolMessage
from langchain_core.prompt_values import PromptValue
from langchain_core.tracers.context import register_configure_hook

from pcache_core.prompt import Segment, SegmentKind
from pcache_integrations._mapping import DocumentIndex, settle
from pcache_integrations.langchain._layouts import Layout, Span, layouts

_log = logging.getLogger(__name__)

# More than a batch renders before its first model call; a layout takes about a kilobyte.
_MAX_LAYOUTS = 16_384
# Templates that are being rendered right now; more can only be left-overs.
_MAX_OPEN_RUNS = 4_096
# How far to look for documents in a chain's inputs and outputs.
_MAX_DEPTH = 4
_MAX_ITEMS = 512


class Provenance:
    """What is known about prompts in this process: documents' texts and templates' layouts.

    Thread-safe.
    """

    def __init__(self) -> None:
        self.documents = DocumentIndex()
        self._layouts: OrderedDict[bytes, Layout] = OrderedDict()
        self._lock = threading.Lock()

    def add_documents(self, value: object, depth: int = 0) -> None:
        """Remember every LangChain document in `value`, nested containers included."""
        if (found := as_document(value)) is not None:
            self.documents.add(found.page_content, document_name(found))
        elif depth == _MAX_DEPTH:
            return
        elif isinstance(value, Mapping):
            for item in value.values():
                self.add_documents(item, depth + 1)
        elif isinstance(value, (list, tuple)):
            if value and isinstance(value[0], (str, int, float)):
                return  # an embedding, or texts: no documents in them
            for item in value[:_MAX_ITEMS]:
                self.add_documents(item, depth + 1)
        elif isinstance(value, ToolMessage):
            self.add_documents(value.artifact, depth + 1)

    def add_rendered(
        self, serialized: Mapping[str, Any], inputs: object, prompt: PromptValue
    ) -> None:
        """Remember how a template rendered."""
        for text, layout in layouts(serialized, inputs, prompt):
            with self._lock:
                self._layouts[_digest(text)] = layout
                self._layouts.move_to_end(_digest(text))
                while len(self._layouts) > _MAX_LAYOUTS:
                    self._layouts.popitem(last=False)

    def segments(self, text: str, kind: SegmentKind) -> list[Segment]:
        """Cut a prompt, or a message's text, into its parts.

        kind: of what neither a template nor a document explains.
        """
        if not text:
            return []
        with harmless("mapping a prompt"):
            return self._map(text, kind)
        return [Segment(text, kind)]

    def _map(self, text: str, kind: SegmentKind) -> list[Segment]:
        with self._lock:
            layout = self._layouts.get(_digest(text), (Span("text", None, len(text)),))
        segments: list[Segment] = []
        position = 0
        for span in layout:
            part = text[position : position + span.chars]
            position += span.chars
            if span.kind == "literal":
                segments.append(Segment(part, "literal"))
            else:
                part_kind = kind if span.kind == "text" else span.kind
                segments += self.documents.split(part, part_kind, span.name)
        return list(settle(segments, text).segments)


class ProvenanceHandler(BaseCallbackHandler):
    """Feeds a `Provenance` from LangChain's callbacks."""

    raise_error = False
    # True silences other handlers' on_llm_start in async models: langchain-ai/langchain#39633.
    run_inline = False

    def __init__(self, provenance: Provenance) -> None:
        self._provenance = provenance
        self._rendering: OrderedDict[UUID, tuple[Mapping[str, Any], object]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def ignore_llm(self) -> bool:
        """Models' events are not needed."""
        return True

    @property
    def ignore_chat_model(self) -> bool:
        """Models' events are not needed."""
        return True

    @property
    def ignore_agent(self) -> bool:
        """Agents' events are not needed; those of their tools and prompts are."""
        return True

    @property
    def ignore_retry(self) -> bool:
        """Retries are not needed."""
        return True

    @property
    def ignore_custom_event(self) -> bool:
        """Custom events are not needed."""
        return True

    def on_chain_start(
        self,
        serialized: dict[str, Any],
        inputs: dict[str, Any],
        *,
        run_id: UUID,
        **kwargs: Any,
    ) -> None:
        """A template is about to render, or a chain may have been given documents."""
        if kwargs.get("run_type") == "prompt":
            with self._lock:
                self._rendering[run_id] = (serialized or {}, inputs)
                while len(self._rendering) > _MAX_OPEN_RUNS:
                    self._rendering.popitem(last=False)
        with harmless("looking for documents in a chain's inputs"):
            self._provenance.add_documents(inputs)

    def on_chain_end(self, outputs: dict[str, Any], *, run_id: UUID, **kwargs: Any) -> None:
        """A template has rendered, or a chain may return documents."""
        rendering = self._pop(run_id)
        if rendering is not None and isinstance(outputs, PromptValue):
            with harmless("aligning a prompt with its template"):
                self._provenance.add_rendered(*rendering, outputs)
            return
        with harmless("looking for documents in a chain's outputs"):
            self._provenance.add_documents(outputs)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """A template could not be rendered."""
        self._pop(run_id)

    def on_retriever_end(self, documents: Sequence[Document], **kwargs: Any) -> None:
        """A retriever has found documents."""
        with harmless("remembering retrieved documents"):
            self._provenance.add_documents(list(documents))

    def on_tool_end(self, output: Any, **kwargs: Any) -> None:
        """A tool may return documents."""
        with harmless("looking for documents in a tool's output"):
            self._provenance.add_documents(output)

    def _pop(self, run_id: UUID) -> tuple[Mapping[str, Any], object] | None:
        with self._lock:
            return self._rendering.pop(run_id, None)


def as_document(value: object) -> Document | None:
    """The document that `value` is; checkpoints give documents back as plain dictionaries."""
    if isinstance(value, Document):
        return value
    if isinstance(value, Mapping) and value.get("type") == "Document":
        text = value.get("page_content")
        if isinstance(text, str):
            return Document(page_content=text, id=value.get("id"))
    return None


def document_name(document: Document) -> str | None:
    """What reports call a document: its id, else its source."""
    name = document.id or document.metadata.get("source")
    return None if name is None else str(name)


@contextmanager
def harmless(task: str) -> Iterator[None]:
    """Log whatever goes wrong instead of raising it.

    Watching costs speed when it fails, and must never cost the answer: it sees every chain of the
    process, and any object that users put through them.
    """
    try:
        yield
    except Exception:
        _log.debug("%s failed; the prompt is used as it is", task, exc_info=True)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


PROVENANCE = Provenance()
_handler = ProvenanceHandler(PROVENANCE)
# A default is visible in every thread and every context; a value that was set would not be.
_HANDLER: ContextVar[BaseCallbackHandler | None] = ContextVar("pcache_handler", default=_handler)
_watching = threading.Event()
_starting = threading.Lock()


def watch_chains() -> None:
    """Begin to watch every chain of this process; once, however often it is called."""
    with _starting:
        if not _watching.is_set():
            register_configure_hook(_HANDLER, inheritable=True)
            _watching.set()
