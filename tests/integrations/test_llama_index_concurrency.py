"""Streams consumed late, queries at the same time: every prompt finds its own nodes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import TextNode
from llama_index_instrumentation import get_dispatcher

import pcache_core
from llama_index_parts import (
    FixedRetriever,
    argument_of,
    documents_of,
    text_of,
    vector_index,
)
from pcache_core import CausalLM, PromptCacheEngine
from pcache_integrations._engines import load_lm
from pcache_integrations.llama_index import PromptCacheLLM, PromptCachePrecompute

pytestmark = pytest.mark.usefixtures("closed_loops")

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture
def llm() -> PromptCacheLLM:
    return PromptCacheLLM(engine=PromptCacheEngine(load_lm("builtin:tiny-rag")), max_tokens=2)


def library(colour: str) -> list[TextNode]:
    """Three nodes of a collection; all collections begin alike."""
    return [
        TextNode(
            text=f"The catalogue of the old library, page {page}: {colour} books.",
            id_=f"{colour}{page}",
        )
        for page in range(3)
    ]


def engines(llm: PromptCacheLLM, **options: Any) -> dict[str, RetrieverQueryEngine]:
    return {
        colour: RetrieverQueryEngine.from_args(FixedRetriever(library(colour)), llm=llm, **options)
        for colour in COLOURS
    }


def assert_unmixed(llm: PromptCacheLLM, count: int) -> None:
    """Each question, which names its collection, stands with exactly that collection's nodes."""
    assert len(llm.engine.reports) == count
    for report in llm.engine.reports:
        colour = argument_of(report, "query_str").split()[1]
        assert documents_of(report) == [f"{colour}{page}" for page in range(3)]
        assert text_of(report).count(colour) == 4


def test_streams_consumed_in_reverse_find_their_own_nodes(llm: PromptCacheLLM) -> None:
    streams = [
        engine.query(f"Which {colour} one?")
        for colour, engine in engines(llm, streaming=True).items()
    ]
    for stream in reversed(streams):
        "".join(stream.response_gen)  # type: ignore[union-attr]
    assert_unmixed(llm, 4)


async def test_async_streams_consumed_in_turns_find_their_own_nodes(llm: PromptCacheLLM) -> None:
    responses = [
        await engine.aquery(f"Which {colour} one?")
        for colour, engine in engines(llm, streaming=True).items()
    ]
    streams = [response.async_response_gen() for response in responses]  # type: ignore[union-attr]
    open_streams = list(streams)
    while open_streams:
        for stream in list(open_streams):
            if await anext(stream, None) is None:
                open_streams.remove(stream)
    assert_unmixed(llm, 4)


async def test_queries_gathered_over_several_indexes_find_their_own_nodes(
    llm: PromptCacheLLM,
) -> None:
    asked = [
        engine.aquery(f"Which {colour} one?")
        for _ in range(3)
        for colour, engine in engines(llm).items()
    ]
    await asyncio.gather(*asked)
    assert_unmixed(llm, 12)


async def test_vector_indexes_gathered_find_their_own_nodes(llm: PromptCacheLLM) -> None:
    async def ask(colour: str) -> None:
        index = vector_index(library(colour))
        await index.as_query_engine(llm=llm, similarity_top_k=3).aquery(f"Which {colour} one?")

    await asyncio.gather(*map(ask, COLOURS))
    for report in llm.engine.reports:
        colour = argument_of(report, "query_str").split()[1]
        assert sorted(map(str, documents_of(report))) == [f"{colour}{page}" for page in range(3)]


def test_queries_of_several_threads_find_their_own_nodes(llm: PromptCacheLLM) -> None:
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            for colour, engine in engines(llm).items():
                threads.submit(engine.query, f"Which {colour} one?")
    assert_unmixed(llm, 12)


async def test_retrieval_and_answer_in_different_tasks_find_the_nodes(llm: PromptCacheLLM) -> None:
    """As the steps of a workflow do: nothing of the first task's context reaches the second."""

    async def answer(colour: str, context: str) -> None:
        await llm.acomplete(f"{context}\nWhich {colour} one?")

    async def retrieve(colour: str) -> str:
        found = await FixedRetriever(library(colour)).aretrieve(colour)
        return "\n".join(scored.node.get_content() for scored in found)

    contexts = await asyncio.gather(*map(retrieve, COLOURS))
    await asyncio.gather(*map(answer, COLOURS, contexts))
    for report in llm.engine.reports:
        colour = text_of(report).split()[-2]
        assert documents_of(report) == [f"{colour}{page}" for page in range(3)]


async def apredict(llm: PromptCacheLLM) -> None:
    await llm.apredict(PromptTemplate("Say {x}."), x="yes")


async def astream(llm: PromptCacheLLM) -> None:
    async for _ in await llm.astream(PromptTemplate("Say {x}."), x="yes"):
        pass


async def acomplete(llm: PromptCacheLLM) -> None:
    await llm.acomplete("Say yes.")


async def astream_complete(llm: PromptCacheLLM) -> None:
    await llm.astream_complete("Say yes.")


async def achat(llm: PromptCacheLLM) -> None:
    await llm.achat([ChatMessage("Say yes.")])


async def astream_chat(llm: PromptCacheLLM) -> None:
    await llm.astream_chat([ChatMessage("Say yes.")])


@pytest.mark.parametrize(
    "ask", [apredict, astream, acomplete, astream_complete, achat, astream_chat]
)
async def test_loading_the_model_does_not_block_the_event_loop(
    ask: Callable[[PromptCacheLLM], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    turned, load = threading.Event(), CausalLM.from_pretrained

    def load_when_the_loop_has_turned(*given: Any, **options: Any) -> CausalLM:
        assert turned.wait(5), "the loop stood still until the model was loaded"
        return load(*given, **options)

    monkeypatch.setattr(CausalLM, "from_pretrained", load_when_the_loop_has_turned)
    folder = Path(pcache_core.__file__).parent / "models" / "tiny-rag"
    llm = PromptCacheLLM(model=str(folder), max_tokens=1)
    asyncio.get_running_loop().call_soon(turned.set)
    await ask(llm)
    assert turned.is_set()


def test_one_handler_is_installed_whatever_is_made(llm: PromptCacheLLM) -> None:
    for _ in range(3):
        PromptCachePrecompute(PromptCacheLLM(engine=llm.engine))
    root = get_dispatcher()
    handlers = [*root.span_handlers, *root.event_handlers]
    ours = [h for h in handlers if type(h).__module__.startswith("pcache_integrations")]
    assert len(ours) == 1
