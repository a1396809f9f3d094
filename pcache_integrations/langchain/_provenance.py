"""Where the parts of a prompt come from: what is known about this process's prompts.

Documents and rendered templates are remembered by content, so nothing has to travel from the
retriever to the model: whatever threads, tasks or wrappers lie between, the model finds its
prompt's parts by the prompt's text.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, ToolMessage
from pydantic import BaseModel

from pcache_core.prompt import Segment, SegmentKind
from pcache_integrations._mapping import DocumentIndex, settle
from pcache_integrations._recurring import Ids, RecurringText
from pcache_integrations.langchain._layouts import (
    Layout,
    Span,
    joined_layout,
    rendered_layout,
    searched_layout,
    trimmed_layout,
)
from pcache_integrations.langchain._source import source_layout

_log = logging.getLogger(__name__)

# More than a batch renders before its first model call; a layout takes about a kilobyte.
_MAX_LAYOUTS = 32_768
# How far to look for documents in a chain's inputs and outputs.
_MAX_DEPTH = 4
_MAX_ITEMS = 512


class Provenance:
    """What is known about prompts in this process: documents' texts and templates' layouts.

    Thread-safe.
    """

    def __init__(self) -> None:
        self.documents = DocumentIndex()
        self.recurring = RecurringText()
        # By the digest of the prompt without the white space around it, as chains like to strip;
        # with how many characters of white space were before and after it.
        self._layouts: OrderedDict[bytes, tuple[Layout, int, int]] = OrderedDict()
        self._lock = threading.Lock()

    def add_documents(self, value: object, depth: int = 0) -> None:
        """Remember every LangChain document in `value`, nested containers included."""
        if (found := as_document(value)) is not None:
            self.documents.add(found.page_content, document_name(found))
        elif depth < _MAX_DEPTH:
            for item in _items(value):
                self.add_documents(item, depth + 1)

    def add_rendered(
        self, source: str, template_format: str, values: Mapping[str, Any], text: str
    ) -> None:
        """Remember how a template rendered. source: its text."""
        layout = rendered_layout(source, template_format, values, text)
        # A value and nothing else, as many document prompts write it: there is nothing to know.
        if any(span.kind == "literal" for span in layout) or len(layout) > 1:
            self._remember(text, layout)

    def add_written(self, inputs: object, text: str) -> None:
        """Remember a prompt that something made of `inputs`; a template is known better."""
        if isinstance(inputs, Mapping) and self._layout(text) is None:
            layout = searched_layout(inputs, text)
            if len(layout) > 1:
                self._remember(text, layout)

    def add_caller(self, text: str) -> None:
        """Remember a text that the functions that led to this call have made, if they tell how."""
        if self._layout(text) is None and (layout := source_layout(text)) is not None:
            self._remember(text, layout)

    def add_flattened(self, messages: Sequence[BaseMessage], text: str) -> None:
        """Remember a text that LangChain made of messages: the marks of roles are its own."""
        parts = [part for message in messages for part in message_texts(message)]
        known = [(part, self._layout(part) or (Span("text", None, len(part)),)) for part in parts]
        layout = joined_layout(known, text)
        if layout is not None:
            self._remember(text, layout)

    def segments(self, text: str, kind: SegmentKind, ids: Ids | None = None) -> list[Segment]:
        """Cut a prompt, or a message's text, into its parts.

        kind: of what neither a template nor a document explains.
        ids: tokenises a segment; if given, text that came before is looked for as well.
        """
        if not text:
            return []
        with harmless("mapping a prompt"):
            return self._map(text, kind, ids)
        return [Segment(text, kind)]

    def _map(self, text: str, kind: SegmentKind, ids: Ids | None) -> list[Segment]:
        layout = self._layout(text)
        segments: list[Segment] = []
        position = 0
        for span in layout or (Span("text", None, len(text)),):
            part = text[position : position + span.chars]
            position += span.chars
            if span.kind == "literal" or (span.kind == "rest" and kind == "text"):
                segments.append(Segment(part, "literal"))
            else:
                # Only where all text is markup, what is merely likely may be template text.
                part_kind = "argument" if span.kind == "argument" else kind
                segments += self.documents.split(part, part_kind, span.name)
        found = settle(segments, text).segments
        return list(found if ids is None else self.recurring.split(found, ids))

    def _layout(self, text: str) -> Layout | None:
        bare, before, after = _trimmed(text)
        with self._lock:
            known = self._layouts.get(_digest(bare))
        if known is None:
            return None
        layout, known_before, known_after = known
        if (known_before, known_after) == (before, after):
            return layout
        inner = trimmed_layout(layout, known_before, known_after)
        spans = (Span("literal", None, before), *inner, Span("literal", None, after))
        return tuple(span for span in spans if span.chars)

    def _remember(self, text: str, layout: Layout) -> None:
        bare, before, after = _trimmed(text)
        digest = _digest(bare)
        with self._lock:
            self._layouts[digest] = (layout, before, after)
            self._layouts.move_to_end(digest)
            while len(self._layouts) > _MAX_LAYOUTS:
                self._layouts.popitem(last=False)


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


def message_texts(message: BaseMessage) -> Iterator[str]:
    """The text of every block of a message."""
    blocks = [message.content] if isinstance(message.content, str) else message.content
    for block in blocks:
        text = block.get("text") if isinstance(block, dict) else block
        if isinstance(text, str) and text:
            yield text


def _items(value: object) -> Iterable[object]:
    """What may hold documents in a container, a message, or a graph's state or command."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], (str, int, float)):
            return ()  # an embedding, or texts: no documents in them
        return value[:_MAX_ITEMS]
    if isinstance(value, ToolMessage):
        return (value.artifact,)
    if isinstance(value, BaseMessage):
        return ()
    if isinstance(value, BaseModel):
        return vars(value).values()
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in fields(value)]
    return ()


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


def _trimmed(text: str) -> tuple[str, int, int]:
    """The text without the white space around it, and how much that was on either side."""
    bare = text.strip()
    before = len(text) - len(text.lstrip()) if bare else 0
    return bare, before, len(text) - len(bare) - before


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


PROVENANCE = Provenance()
