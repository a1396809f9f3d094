"""Fixtures for the tests of the integrations."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from pcache_integrations.llama_index import _automap, _handlers, _model, _prompts, ingest
from pcache_integrations.llama_index import llm as _llm
from pcache_integrations.llama_index._capture import Capture


@pytest.fixture
def closed_loops(request: pytest.FixtureRequest) -> None:
    """Have LlamaIndex's synchronous methods run their coroutines in a loop that gets closed.

    They would make themselves a loop and leave it open if the thread may have one.
    """
    if not inspect.iscoroutinefunction(request.function):
        asyncio.set_event_loop(None)


@pytest.fixture
def nothing_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start without the plans and nodes of earlier tests, which may have used the same texts."""
    capture = Capture()
    for module in (_automap, _handlers, _prompts, _model, _llm, ingest):
        monkeypatch.setattr(module, "CAPTURE", capture)
