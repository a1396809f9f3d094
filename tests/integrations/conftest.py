"""Fixtures for the tests of the integrations."""

from __future__ import annotations

import asyncio
import inspect

import pytest


@pytest.fixture
def closed_loops(request: pytest.FixtureRequest) -> None:
    """Have LlamaIndex's synchronous methods run their coroutines in a loop that gets closed.

    They would make themselves a loop and leave it open if the thread may have one.
    """
    if not inspect.iscoroutinefunction(request.function):
        asyncio.set_event_loop(None)
