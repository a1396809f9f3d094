"""Hooks into LlamaIndex's instrumentation: they see nodes and templates on their way to a model."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Mapping
from typing import Any

from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.retrieval import RetrievalEndEvent
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import NodeWithScore
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from llama_index_instrumentation.span import BaseSpan

from pcache_integrations.llama_index._automap import AutoMap
from pcache_integrations.llama_index._capture import CAPTURE
from pcache_integrations.llama_index._shadow import shadow
from pcache_integrations.llama_index._templates import templates_of

_logger = logging.getLogger(__name__)
_lock = threading.Lock()


class PromptCacheSpanHandler(BaseSpanHandler[BaseSpan]):
    """Sees the final nodes of an answer, and templates that reach a model out of our sight.

    These are the ones that engines hold, and those given to LLMs that wrap one of ours. Keeps no
    spans.
    """

    @classmethod
    def class_name(cls) -> str:
        """The name in traces."""
        return "PromptCacheSpanHandler"

    def span_enter(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Remember what is about to be put into a prompt. Never raises."""
        try:
            _enter(instance, bound_args.arguments)
        except Exception:
            _logger.debug("could not read the arguments of span %s", id_, exc_info=True)

    def span_exit(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: no span was opened."""

    def span_drop(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: no span was opened."""

    def new_span(self, *args: Any, **kwargs: Any) -> None:
        """No span is opened."""

    def prepare_to_exit_span(self, *args: Any, **kwargs: Any) -> None:
        """No span was opened."""

    def prepare_to_drop_span(self, *args: Any, **kwargs: Any) -> None:
        """No span was opened."""


class PromptCacheEventHandler(BaseEventHandler):
    """Sees every retrieval, whatever becomes of its nodes."""

    @classmethod
    def class_name(cls) -> str:
        """The name in traces."""
        return "PromptCacheEventHandler"

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        """Remember retrieved nodes. Never raises."""
        if isinstance(event, RetrievalEndEvent):
            try:
                CAPTURE.add_nodes(scored.node for scored in event.nodes)
            except Exception:
                _logger.debug("could not read retrieved nodes", exc_info=True)


def install_handlers() -> None:
    """Hook into LlamaIndex, once for the process."""
    root = get_dispatcher()
    with _lock:
        if not any(isinstance(handler, PromptCacheSpanHandler) for handler in root.span_handlers):
            root.add_span_handler(PromptCacheSpanHandler())
        if not any(isinstance(handler, PromptCacheEventHandler) for handler in root.event_handlers):
            root.add_event_handler(PromptCacheEventHandler())


def _enter(instance: Any | None, arguments: Mapping[str, Any]) -> None:
    if instance is not None and not isinstance(instance, LLM):
        CAPTURE.add_templates(templates_of(vars(instance)))
    if isinstance(instance, BaseSynthesizer) and "nodes" in arguments:
        nodes = [n.node if isinstance(n, NodeWithScore) else n for n in arguments["nodes"]]
        CAPTURE.add_nodes(nodes)
        CAPTURE.add_context(nodes)
    elif isinstance(instance, LLM) and _wraps_ours(instance):
        template = arguments.get("prompt")
        if isinstance(template, BasePromptTemplate) and "output_cls" not in arguments:
            for plan in shadow(instance, template, arguments.get("prompt_args", {})):
                CAPTURE.add_plan(plan)


def _wraps_ours(llm: LLM) -> bool:
    """Whether an LLM holds one of ours, to which it may hand formatted texts.

    Ours itself plans without this; what others do is none of our business.
    """
    if isinstance(llm, AutoMap):
        return False
    held = [*vars(llm).values(), *(llm.__pydantic_private__ or {}).values()]
    return any(
        isinstance(inner, AutoMap) or (isinstance(inner, LLM) and _wraps_ours(inner))
        for inner in held
    )
