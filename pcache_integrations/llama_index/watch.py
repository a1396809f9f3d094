"""Watch LlamaIndex's spans: the nodes of an answer, and what ingestion pipelines hand out.

Nodes reach a model as text that query engines have joined already, and only here are they still
apart: as what a retriever returned, or as what postprocessors made of that for a synthesizer. A
pipeline calls no transformation in this process for nodes that come from its cache or from other
processes; the end of its run is all there is to see of them.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.span import BaseSpan

from pcache_integrations.documents import DocumentIndex

# One for the process, as LlamaIndex's spans are. Documents are found by content, so that it doesn't
# matter who retrieved them, when, or in which thread.
DOCUMENTS = DocumentIndex()

_logger = logging.getLogger(__name__)
_installing = threading.Lock()


def node_text(node: BaseNode) -> str:
    """Return the node's text as prompts hold it: with the metadata that is meant for the model."""
    return str(node.get_content(metadata_mode=MetadataMode.LLM)).strip()


def remember(nodes: Iterable[BaseNode | NodeWithScore]) -> None:
    """Recognise nodes in prompts from now on: with their metadata, and bare."""
    for item in nodes:
        node = item.node if isinstance(item, NodeWithScore) else item
        DOCUMENTS.add(str(node.get_content()), node.node_id)
        DOCUMENTS.add(node_text(node), node.node_id)


class PromptCacheSpanHandler(BaseSpanHandler[BaseSpan]):
    """Remembers nodes, has runs end well. Opens no spans; LlamaIndex swallows what it raises."""

    @classmethod
    def class_name(cls) -> str:
        """Return the name in traces."""
        return "PromptCacheSpanHandler"

    def new_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Remember the nodes that a synthesizer is given, as postprocessors have made them."""
        if isinstance(instance, BaseSynthesizer):
            remember(bound_args.arguments.get("nodes", ()))

    def prepare_to_exit_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        result: Any | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember what was retrieved; have a pipeline's transformations catch up."""
        if isinstance(instance, BaseRetriever) and isinstance(result, list):
            remember(item for item in result if isinstance(item, NodeWithScore))
        elif isinstance(instance, IngestionPipeline) and isinstance(result, Sequence):
            found = (getattr(step, "catch_up", None) for step in instance.transformations)
            for catch_up in filter(callable, found):
                if ".arun-" in id_:  # the loop goes on meanwhile
                    asyncio.get_running_loop().run_in_executor(None, _tried, catch_up, result)
                else:
                    _tried(catch_up, result)

    def prepare_to_drop_span(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: no span was opened."""


def install_handler() -> None:
    """Hook into LlamaIndex, once for the process."""
    root = get_dispatcher()
    with _installing:
        if not any(isinstance(handler, PromptCacheSpanHandler) for handler in root.span_handlers):
            root.add_span_handler(PromptCacheSpanHandler())


def _tried(catch_up: Callable[..., object], nodes: Sequence[BaseNode]) -> None:
    try:
        catch_up(nodes)
    except Exception as error:
        _logger.warning("nodes were not encoded after the run: %s", error)
