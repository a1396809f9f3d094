"""Every way to use an LLM through LlamaIndex is mapped: nodes, template text and question."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core import Settings
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import TextNode

from llama_index_parts import (
    FixedRetriever,
    argument_of,
    chat_lm,
    documents_of,
    text_of,
    vector_index,
)
from llama_index_shapes import (
    FOUND,
    QUESTION,
    SHAPES,
    TEMPLATES,
    Prompted,
    Use,
    query_engine,
    texts_of,
)
from pcache_core import PromptCacheEngine
from pcache_integrations._engines import load_lm
from pcache_integrations.llama_index import PromptCacheLLM
from prompt_painter import Painted, paint

pytestmark = [
    pytest.mark.usefixtures("nothing_captured", "own_settings"),
    # LlamaIndex's agents look at all attributes of their pydantic selves, and at a deprecated one.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step"),
]

FIRST_QUESTION = "Which people are in the register?"
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


@pytest.fixture(scope="module")
def tally() -> Iterator[Counter[str]]:
    """What was mapped by all tests; printed."""
    counts: Counter[str] = Counter()
    yield counts
    print("\nmapped:", ", ".join(f"{n} {kind}s" for kind, n in counts.items()))  # noqa: T201


def paint_all(llm: Prompted, found: list[TextNode] | None = None) -> Painted:
    """All prompts that the LLM was given. found: the nodes in them, if not the usual ones."""
    painted = Painted()
    for report in llm.engine.reports:
        one = paint(report, texts_of(found or FOUND), QUESTIONS, TEMPLATES)
        painted.counts += one.counts
        painted.counts["call"] += 1
        painted.wrong += one.wrong
    return painted


async def sync(engine: Any) -> None:
    await asyncio.to_thread(engine.query, QUESTION)


async def asynchronous(engine: Any) -> None:
    await engine.aquery(QUESTION)


async def stream(engine: Any) -> None:
    response = await asyncio.to_thread(engine.query, QUESTION)
    await asyncio.to_thread(lambda: "".join(response.response_gen))


async def async_stream(engine: Any) -> None:
    response = await engine.aquery(QUESTION)
    async for _ in response.async_response_gen():
        pass


HOWS = [sync, asynchronous, stream, async_stream]
# calls for three nodes
MODES = {
    "compact": 1, "refine": 3, "tree_summarize": 1, "accumulate": 3, "compact_accumulate": 1,
    "simple_summarize": 1, "generation": 1,
}  # fmt: skip
CAN_STREAM = ("compact", "refine", "tree_summarize", "simple_summarize", "generation")


@pytest.mark.parametrize(
    ("mode", "how"),
    [(m, h) for m in MODES for h in HOWS if m in CAN_STREAM or h in (sync, asynchronous)],
)
async def test_response_modes(
    llm: Prompted, mode: str, how: Callable[[Any], Awaitable[None]], tally: Counter[str]
) -> None:
    await how(query_engine(llm, mode, streaming="stream" in how.__name__))
    painted = paint_all(llm)
    assert painted.wrong == []
    assert painted.counts["call"] == painted.counts["question"] == MODES[mode]
    assert painted.counts["document"] == (0 if mode == "generation" else 3)
    if mode != "generation":
        assert painted.counts["literal"] >= 3 * painted.counts["call"]
    tally += painted.counts


@pytest.mark.parametrize("mode", ["no_text", "context_only"])
def test_modes_without_an_answer_ask_nothing(
    llm: Prompted, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "_llm", llm)
    response = query_engine(llm, mode).query(QUESTION)
    assert len(response.source_nodes) == 3
    assert not llm.engine.reports


async def chat(engine: Any, question: str) -> None:
    await asyncio.to_thread(engine.chat, question)


async def achat(engine: Any, question: str) -> None:
    await engine.achat(question)


async def stream_chat(engine: Any, question: str) -> None:
    response = await asyncio.to_thread(engine.stream_chat, question)
    await asyncio.to_thread(lambda: "".join(response.response_gen))


async def astream_chat(engine: Any, question: str) -> None:
    response = await engine.astream_chat(question)
    async for _ in response.async_response_gen():
        pass


# calls for two questions, and how many of them have the nodes
CHAT_ENGINES = {
    SimpleChatEngine: (2, 0),
    ContextChatEngine: (2, 2),
    CondenseQuestionChatEngine: (3, 2),
    CondensePlusContextChatEngine: (3, 2),
}


def chat_engine(kind: Any, llm: PromptCacheLLM) -> Any:
    options: dict[str, Any] = {"memory": ChatMemoryBuffer.from_defaults(token_limit=1500)}
    if kind is CondenseQuestionChatEngine:
        options["query_engine"] = query_engine(llm)
    else:
        options["system_prompt"] = "Be kind and never guess."
    if kind in (ContextChatEngine, CondensePlusContextChatEngine):
        options["retriever"] = FixedRetriever(FOUND)
    return kind.from_defaults(llm=llm, **options)


@pytest.mark.parametrize("how", [chat, achat, stream_chat, astream_chat])
@pytest.mark.parametrize("kind", CHAT_ENGINES)
async def test_chat_engines(
    llm: Prompted, kind: Any, how: Callable[[Any, str], Awaitable[None]], tally: Counter[str]
) -> None:
    engine = chat_engine(kind, llm)
    for question in (FIRST_QUESTION, QUESTION):
        await how(engine, question)
    painted = paint_all(llm)
    calls, with_nodes = CHAT_ENGINES[kind]
    assert painted.wrong == []
    assert painted.counts["call"] == calls
    assert painted.counts["document"] == 3 * with_nodes
    assert painted.counts["literal"] >= 2
    tally += painted.counts


@pytest.mark.parametrize("name", SHAPES)
async def test_engines_agents_and_templates(llm: Prompted, name: str, tally: Counter[str]) -> None:
    use: Use = SHAPES[name]
    found = await use(llm)
    painted = paint_all(llm, found)
    assert painted.wrong == []
    assert painted.counts["document"] >= (2 if name == "fused queries" else 3)
    assert painted.counts["question"] >= (name != "evaluation")
    assert painted.counts["literal"] >= (name != "formatted by hand")
    tally += painted.counts


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
