"""Every way to use an LLM through LlamaIndex is mapped: nodes are documents, questions are data.

The oracle is plain text search for what each use asks about.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core import Settings
from llama_index.core.chat_engine import CondenseQuestionChatEngine
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import TextNode

from llama_index_parts import (
    FixedRetriever,
    argument_of,
    chat_lm,
    documents_of,
    pieces_of,
    text_of,
    vector_index,
)
from llama_index_shapes import (
    ABOUT_THE_MAYOR,
    CHAT_ENGINES,
    FIRST_QUESTION,
    FOUND,
    MODE_USES,
    MODES,
    QUESTION,
    SHAPES,
    Prompted,
    Use,
    achat,
    astream_chat,
    chat,
    conversed,
    query_engine,
    stream_chat,
    texts_of,
)
from pcache_core import PromptCacheEngine
from pcache_integrations._engines import load_lm
from pcache_integrations.llama_index import PromptCacheLLM
from prompt_painter import Painted, paint

pytestmark = [
    pytest.mark.usefixtures("own_settings"),
    # LlamaIndex's agents look at all attributes of their pydantic selves, and at a deprecated one.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step"),
]

QUESTIONS = (QUESTION, FIRST_QUESTION)


@pytest.fixture(scope="module")
def engines() -> dict[str, PromptCacheEngine]:
    return {
        "completion": PromptCacheEngine(load_lm("builtin:tiny-rag")),
        "chat": PromptCacheEngine(chat_lm()),
    }


@pytest.fixture(params=["completion", "chat"])
def llm(request: pytest.FixtureRequest, engines: dict[str, PromptCacheEngine]) -> Prompted:
    engine = engines[request.param]
    engine.reports.clear()
    return Prompted(engine=engine, max_tokens=24, stop=["\n"])


@pytest.fixture
def own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines ask the settings for a model even where they need none."""
    monkeypatch.setattr(Settings, "_embed_model", MockEmbedding(embed_dim=2))


def paint_all(llm: Prompted, found: list[TextNode] | None = None) -> Painted:
    """All prompts that the LLM was given. found: the nodes in them, if not the usual ones."""
    painted = Painted()
    for report in llm.engine.reports:
        one = paint(report, texts_of(found or FOUND), QUESTIONS)
        painted.counts += one.counts
        painted.counts["call"] += 1
        painted.wrong += one.wrong
    return painted


@pytest.mark.parametrize("name", MODE_USES)
async def test_response_modes(llm: Prompted, name: str) -> None:
    await MODE_USES[name](llm, ABOUT_THE_MAYOR)
    mode = name.partition(",")[0]
    painted = paint_all(llm)
    assert painted.wrong == []
    assert painted.counts["call"] == painted.counts["question"] == MODES[mode]
    names = [name for report in llm.engine.reports for name in documents_of(report)]
    assert sorted(map(str, names)) == ([] if mode == "generation" else ["d1", "d2", "d3"])
    assert painted.counts["document"] == len(names)
    for report in llm.engine.reports:
        assert argument_of(report, "query_str") == QUESTION
        assert mode == "generation" or pieces_of(report)[0] == ("literal", None)


@pytest.mark.parametrize("mode", ["no_text", "context_only"])
def test_modes_without_an_answer_ask_nothing(
    llm: Prompted, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "_llm", llm)
    response = query_engine(llm, ABOUT_THE_MAYOR, mode).query(QUESTION)
    assert len(response.source_nodes) == 3
    assert not llm.engine.reports


@pytest.mark.parametrize("how", [chat, achat, stream_chat, astream_chat])
@pytest.mark.parametrize("kind", CHAT_ENGINES)
async def test_chat_engines(
    llm: Prompted, kind: Any, how: Callable[[Any, str], Awaitable[None]]
) -> None:
    await conversed(kind, how)(llm, ABOUT_THE_MAYOR)
    painted = paint_all(llm)
    calls, with_nodes = CHAT_ENGINES[kind]
    assert painted.wrong == []
    assert painted.counts["call"] == calls
    assert painted.counts["document"] == 3 * with_nodes
    last = llm.engine.reports[-1]
    if with_nodes and kind is not CondenseQuestionChatEngine:  # which asks the model's own question
        assert pieces_of(last)[0] == ("literal", None)
        assert argument_of(last, "query_str") == QUESTION


@pytest.mark.parametrize("name", SHAPES)
async def test_engines_agents_and_templates(llm: Prompted, name: str) -> None:
    use: Use = SHAPES[name]
    found = await use(llm, ABOUT_THE_MAYOR)
    painted = paint_all(llm, found)
    assert painted.wrong == []
    assert painted.counts["document"] >= (2 if name == "fused queries" else 3)
    assert painted.counts["question"] >= (name != "evaluation")


async def test_the_first_part_of_a_cut_node_is_a_document(llm: Prompted) -> None:
    long = TextNode(text=" ".join(f"Entry {i}: nothing." for i in range(300)), id_="long")
    cramped = PromptCacheLLM(engine=llm.engine, max_tokens=2, context_window=700)
    engine = RetrieverQueryEngine.from_args(FixedRetriever([FOUND[0], long]), llm=cramped)
    await engine.aquery(QUESTION)
    first, *others = llm.engine.reports
    assert documents_of(first) == ["d1", "long"]
    (cut,) = [s.text for s in first.segments if s.name == "long"]
    assert long.text.startswith(cut)
    assert others
    assert all(documents_of(report) == [] for report in others)


LIBRARIES = ("red", "green", "blue", "white", "black", "brown", "pink", "grey")


def library(colour: str) -> list[TextNode]:
    """Three nodes; those of all libraries begin alike."""
    text = "The catalogue of the old library, page {}: {} books."
    return [TextNode(text=text.format(page, colour), id_=f"{colour}{page}") for page in range(3)]


async def test_eighty_queries_at_once_over_eight_indexes_find_their_own_nodes(
    engines: dict[str, PromptCacheEngine],
) -> None:
    """Forty in one event loop, forty in eight threads, all by one LLM."""
    engine = engines["completion"]
    engine.reports.clear()
    llm = PromptCacheLLM(engine=engine, max_tokens=1, reuse="fast")
    asked = {
        colour: vector_index(library(colour)).as_query_engine(llm=llm, similarity_top_k=3)
        for colour in LIBRARIES
    }
    with ThreadPoolExecutor(8) as threads:
        jobs = [
            threads.submit(query.query, f"Which {colour} one?")
            for colour, query in asked.items()
            for _ in range(5)
        ]
        tasks = [
            query.aquery(f"Which {colour} one?")
            for colour, query in asked.items()
            for _ in range(5)
        ]
        await asyncio.gather(*tasks)
        await asyncio.to_thread(lambda: [job.result() for job in jobs])
    assert len(engine.reports) == 80
    for report in engine.reports:
        colour = argument_of(report, "query_str").split()[1]
        assert sorted(map(str, documents_of(report))) == [f"{colour}{page}" for page in range(3)]
        assert text_of(report).count(colour) == 4
