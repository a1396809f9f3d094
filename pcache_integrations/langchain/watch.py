"""What this process knows of its prompts: documents, and what templates wrote of which values.

One callback handler learns both, as LangChain tells every handler: retrievers, chains and tools
pass documents on, and the run of a prompt template has inputs and an output. Both are found again
by content, so nothing has to travel from the retriever to the model.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.messages import BaseMessage
from langchain_core.prompt_values import PromptValue
from langchain_core.tracers.context import register_configure_hook
from pydantic import BaseModel

from pcache_core.prompt import Segment, SegmentKind
from pcache_integrations.documents import DocumentIndex, WrittenIndex, settle

# How far to look for documents in a chain's inputs and outputs.
_MAX_DEPTH = 4
_MAX_ITEMS = 512


class Watcher(BaseCallbackHandler):
    """Learns from LangChain's callbacks, and cuts prompts into their parts. Thread-safe."""

    # True silences other handlers' on_llm_start in async models: langchain-ai/langchain#39633.
    run_inline = False
    ignore_llm = ignore_chat_model = ignore_retry = ignore_custom_event = True

    def __init__(self) -> None:
        self.documents = DocumentIndex()
        self._written = WrittenIndex()
        self._runs: dict[UUID, tuple[Any, Any]] = {}  # what templates being rendered are given

    def segments(self, text: str, kind: SegmentKind) -> list[Segment]:
        """Cut a prompt, or a message's text, into its parts.

        kind: of what neither a template nor a document explains.
        Returns: segments whose texts join to `text`; none when it is empty.
        """
        found = self.documents.cut(self._written.pieces(text, kind))
        return list(settle(found, text).segments) if text else []

    def add_documents(self, value: object) -> None:
        """Remember every LangChain document in `value`, nested containers included."""
        try:
            for document in _documents_in(value):
                name = document.id or document.metadata.get("source")
                self.documents.add(document.page_content, None if name is None else str(name))
        except Exception:  # of objects that are not ours; must never cost an answer
            logging.getLogger(__name__).debug(
                "can't look for documents in a %s", type(value).__name__, exc_info=True
            )

    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Look for documents; remember what a template is given."""
        if kwargs.get("run_type") == "prompt":
            self._runs[run_id] = (serialized, inputs)
        self.add_documents(inputs)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Look for documents; remember what a template wrote."""
        serialized, inputs = self._runs.pop(run_id, (None, None))
        self.add_documents(outputs)
        if inputs is not None and isinstance(outputs, PromptValue):
            self._add_written(serialized, inputs, outputs)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Forget a template that could not be rendered."""
        self._runs.pop(run_id, None)

    def on_retriever_end(self, documents: Any, **kwargs: Any) -> None:
        """Remember what a retriever found."""
        self.add_documents(documents)

    def on_tool_end(self, output: Any, **kwargs: Any) -> None:
        """Remember what a tool found."""
        self.add_documents(output)

    def _add_written(self, serialized: Any, inputs: Any, prompt: PromptValue) -> None:
        nodes = list(_mappings_in(serialized))
        variables = next((n["input_variables"] for n in nodes if "input_variables" in n), None)
        if not isinstance(inputs, Mapping):  # a template of one variable takes its value bare
            inputs = dict.fromkeys(variables or ["input"], inputs)
        partial = dict(p for node in nodes for p in node.get("partial_variables", {}).items())
        names = inputs if variables is None else {*variables, *partial}
        given = {name: inputs.get(name, partial.get(name)) for name in names}
        values = {name: value for name, value in given.items() if isinstance(value, str)}
        sources = [node["template"] for node in nodes if isinstance(node.get("template"), str)]
        # What braces stand for in an f-string; in other formats they are no template text.
        sources = [source.replace("{{", "{").replace("}}", "}") for source in sources]
        lists = [value for value in given.values() if isinstance(value, list)]
        history = [m for value in lists for m in value if isinstance(m, BaseMessage)]
        whole = prompt.to_string()
        texts = {whole, whole.strip(), *message_texts(prompt.to_messages())}
        for text in texts.difference(message_texts(history)):
            self._written.add(text, values, sources)


WATCHER = Watcher()


@cache
def watch_chains() -> None:
    """Have `WATCHER` see every chain of this process; once, however often it is called."""
    # A default is visible in every thread and every context; a value that was set would not be.
    register_configure_hook(ContextVar("pcache_watcher", default=WATCHER), inheritable=True)


def message_texts(messages: Iterable[BaseMessage]) -> Iterator[str]:
    """Yield the text of every block of the messages."""
    for message in messages:
        blocks = [message.content] if isinstance(message.content, str) else message.content
        for block in blocks:
            text = block.get("text") if isinstance(block, dict) else block
            if isinstance(text, str) and text:
                yield text


def _mappings_in(value: object) -> Iterator[Mapping[str, Any]]:
    """Yield every mapping in a template's serialised form, the outermost first."""
    if isinstance(value, Mapping):
        yield value
        value = value.values()
    if isinstance(value, Iterable) and not isinstance(value, str):
        for item in value:
            yield from _mappings_in(item)


def _documents_in(value: object, depth: int = 0) -> Iterator[Document]:
    """Yield the documents in a container, a message, or a graph's state or command."""
    items: Collection[object] = ()
    if isinstance(value, Document):
        yield value
    elif isinstance(value, Mapping) and value.get("type") == "Document":  # as checkpoints write it
        yield Document(page_content=value.get("page_content", ""), id=value.get("id"))
    elif isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (list, tuple)):
        items = value[:_MAX_ITEMS]
    elif isinstance(value, BaseMessage):
        items = (getattr(value, "artifact", None),)
    elif isinstance(value, BaseModel):
        items = vars(value).values()
    elif is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, field.name, None) for field in fields(value)]
    for item in items if depth < _MAX_DEPTH else ():
        yield from _documents_in(item, depth + 1)
