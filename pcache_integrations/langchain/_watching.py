"""How `PROVENANCE` learns: by watching the chains of this process.

One callback handler sees the documents that retrievers, chains and tools pass on. LangChain's
formatters, which render every string template, say what they were given and what they made of it:
that is seen of classic chains and of `template.format()` too, for which no callback fires.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.prompt_values import StringPromptValue
from langchain_core.prompts.string import DEFAULT_FORMATTER_MAPPING
from langchain_core.tracers.context import register_configure_hook

from pcache_integrations.langchain._provenance import PROVENANCE, Provenance, harmless

# Templates that are being rendered right now; more can only be left-overs.
_MAX_OPEN_RUNS = 4_096


class ProvenanceHandler(BaseCallbackHandler):
    """Feeds a `Provenance` from LangChain's callbacks."""

    raise_error = False
    # True silences other handlers' on_llm_start in async models: langchain-ai/langchain#39633.
    run_inline = False

    def __init__(self, provenance: Provenance) -> None:
        self._provenance = provenance
        self._rendering: OrderedDict[UUID, object] = OrderedDict()
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
                self._rendering[run_id] = inputs
                while len(self._rendering) > _MAX_OPEN_RUNS:
                    self._rendering.popitem(last=False)
        with harmless("looking for documents in a chain's inputs"):
            self._provenance.add_documents(inputs)

    def on_chain_end(self, outputs: dict[str, Any], *, run_id: UUID, **kwargs: Any) -> None:
        """A template has rendered, or a chain may return documents."""
        inputs = self._pop(run_id)
        output: object = outputs
        if isinstance(output, StringPromptValue):
            with harmless("looking for a template's values in its prompt"):
                self._provenance.add_written(inputs, output.to_string())
            return
        with harmless("looking for documents in a chain's outputs"):
            self._provenance.add_documents(output)

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

    def _pop(self, run_id: UUID) -> object:
        with self._lock:
            return self._rendering.pop(run_id, None)


def _watched(render: Callable[..., str], template_format: str) -> Callable[..., str]:
    @wraps(render)
    def rendered(template: str, /, **values: Any) -> str:
        text = render(template, **values)
        with harmless("aligning a prompt with its template"):
            PROVENANCE.add_rendered(template, template_format, values, text)
        return text

    return rendered


_handler = ProvenanceHandler(PROVENANCE)
# A default is visible in every thread and every context; a value that was set would not be.
_HANDLER: ContextVar[BaseCallbackHandler | None] = ContextVar("pcache_handler", default=_handler)
_watching = threading.Event()
_starting = threading.Lock()


def watch_chains() -> None:
    """Begin to watch every chain of this process; once, however often it is called."""
    with _starting:
        if _watching.is_set():
            return
        register_configure_hook(_HANDLER, inheritable=True)
        for template_format, render in DEFAULT_FORMATTER_MAPPING.items():
            DEFAULT_FORMATTER_MAPPING[template_format] = _watched(render, template_format)
        _watching.set()
