"""What LlamaIndex's instrumentation and callbacks say of the calls inside a block."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llama_index.core.bridge.pydantic import Field
from llama_index.core.callbacks import CBEventType
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from llama_index_instrumentation.span import BaseSpan


class _Events(BaseEventHandler):
    seen: list[BaseEvent] = Field(default_factory=list)

    def handle(self, event: BaseEvent, **_: Any) -> None:
        self.seen.append(event)


class _Spans(BaseSpanHandler[BaseSpan]):
    names: list[str] = Field(default_factory=list)

    def span_enter(
        self, id_: str, bound_args: inspect.BoundArguments, *args: Any, **kwargs: Any
    ) -> None:
        self.names.append(id_.partition("-")[0])

    def span_exit(self, *args: Any, **kwargs: Any) -> None: ...

    def span_drop(self, *args: Any, **kwargs: Any) -> None: ...

    def new_span(self, *args: Any, **kwargs: Any) -> None: ...

    def prepare_to_exit_span(self, *args: Any, **kwargs: Any) -> None: ...

    def prepare_to_drop_span(self, *args: Any, **kwargs: Any) -> None: ...


class Watched:
    """events: by class name. spans: names of the methods that were entered."""

    def __init__(self, events: _Events, spans: _Spans) -> None:
        self._events = events
        self._spans = spans

    @property
    def events(self) -> list[BaseEvent]:
        return self._events.seen

    def names(self, part: str = "") -> list[str]:
        return [type(e).__name__ for e in self._events.seen if part in type(e).__name__]

    def spans(self, part: str = "") -> list[str]:
        return [name for name in self._spans.names if part in name]


@contextmanager
def watched() -> Iterator[Watched]:
    """Everything that is announced inside of the block."""
    root = get_dispatcher()
    events, spans = _Events(), _Spans()
    root.event_handlers.append(events)
    root.span_handlers.append(spans)
    try:
        yield Watched(events, spans)
    finally:
        root.event_handlers.remove(events)
        root.span_handlers.remove(spans)


class Callbacks(BaseCallbackHandler):
    """Starts and ends of model calls."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.started: list[dict[str, Any]] = []
        self.ended: list[dict[str, Any]] = []

    def on_event_start(
        self, event_type: CBEventType, payload: Any = None, event_id: str = "", **_: Any
    ) -> str:
        if event_type is CBEventType.LLM:
            self.started.append(payload)
        return event_id

    def on_event_end(self, event_type: CBEventType, payload: Any = None, **_: Any) -> None:
        if event_type is CBEventType.LLM:
            self.ended.append(payload)

    def start_trace(self, trace_id: str | None = None) -> None: ...

    def end_trace(self, trace_id: str | None = None, trace_map: Any = None) -> None: ...
