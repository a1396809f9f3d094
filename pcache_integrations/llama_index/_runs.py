"""What a pipeline's runs hand out without having called its transformations in this process."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index.core.schema import BaseNode
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.span import BaseSpan

_logger = logging.getLogger(__name__)
_lock = threading.Lock()


@runtime_checkable
class CatchesUp(Protocol):
    """A transformation that has something to do in this process."""

    def catch_up(self, nodes: Sequence[BaseNode]) -> None:
        """Do it for those of a run's nodes that it has not seen."""


class PipelineSpanHandler(BaseSpanHandler[BaseSpan]):
    """Sees the nodes of every finished run. Keeps no spans."""

    @classmethod
    def class_name(cls) -> str:
        """The name in traces."""
        return "PromptCachePipelineSpanHandler"

    def span_exit(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        result: Any | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Have the transformations catch up: in `arun` in another thread. Never raises."""
        if not isinstance(instance, IngestionPipeline) or not isinstance(result, Sequence):
            return
        for transformation in instance.transformations:
            if not isinstance(transformation, CatchesUp):
                continue
            if ".arun-" in id_:
                asyncio.get_running_loop().run_in_executor(None, _run, transformation, result)
            else:
                _run(transformation, result)

    def span_enter(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: no span is opened."""

    def span_drop(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: no span was opened."""

    def new_span(self, *args: Any, **kwargs: Any) -> None:
        """No span is opened."""

    def prepare_to_exit_span(self, *args: Any, **kwargs: Any) -> None:
        """No span was opened."""

    def prepare_to_drop_span(self, *args: Any, **kwargs: Any) -> None:
        """No span was opened."""


def watch_runs() -> None:
    """Hook into LlamaIndex, once for the process."""
    root = get_dispatcher()
    with _lock:
        if not any(isinstance(handler, PipelineSpanHandler) for handler in root.span_handlers):
            root.add_span_handler(PipelineSpanHandler())


def _run(transformation: CatchesUp, nodes: Sequence[BaseNode]) -> None:
    try:
        transformation.catch_up(nodes)
    except Exception as error:
        _logger.warning("nodes were not encoded after the run: %s", error)
