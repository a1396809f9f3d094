"""A program that uses every part of the public interface. Type checkers read it; nothing runs it.

Each `assert_type` is what a user's editor shows. Checked in strict mode, without a cast or an
ignored line.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator
from typing import assert_type

import torch
from langchain_core.documents import Document
from langchain_core.messages import AIMessage
from langchain_core.prompts import PromptTemplate as LangChainTemplate
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from llama_index.core.schema import TextNode

from pcache_core import (
    CausalLM,
    Chunk,
    DiskStore,
    EncodeReport,
    ForgetReport,
    Generation,
    Grammar,
    MemoryStore,
    Message,
    ModuleStore,
    Preamble,
    Prefill,
    Prompt,
    PromptCacheEngine,
    PromptCacheError,
    Report,
    SamplingParams,
    Segment,
    SegmentReport,
    TieredStore,
    Tool,
    ToolFormat,
)
from pcache_core.base_engine import Engine, EngineStats
from pcache_core.store import Hit, StoreStats
from pcache_core.store.object import ObjectStore
from pcache_core.store.redis import RedisStore
from pcache_integrations.langchain import ChatPromptCache, track
from pcache_integrations.langchain import PromptCacheLLM as LangChainLLM
from pcache_integrations.llama_index import PromptCacheLLM as LlamaIndexLLM
from pcache_integrations.llama_index import (
    PromptCachePrecompute,
    PromptCacheSynthesizer,
)
from pcache_templates import (
    FormatTemplate,
    JinjaTemplate,
    PromptProgram,
    prompt_program,
)


def engine_of(folder: str) -> PromptCacheEngine:
    lm = CausalLM.from_pretrained("builtin:tiny-rag", dtype="auto", device="cpu")
    assert_type(lm.context_length, int | None)
    assert_type(lm.name, str)
    assert_type(lm.dtype, torch.dtype)
    store = TieredStore([MemoryStore(budget_bytes=2**30), DiskStore(folder, storage_dtype="int8")])
    assert_type(store.tiers, tuple[ModuleStore, ...])
    assert_type(store.stats(), StoreStats)
    preamble = Preamble(company=["A short text.", "Another one."])
    return PromptCacheEngine(
        lm, store=store, reuse="balanced", namespace="docs", preamble=preamble, repair=64
    )


def ask(engine: PromptCacheEngine) -> str:
    assert_type(engine.encode(["a", "b"], progress=False), EncodeReport)
    assert_type(engine.preamble, Preamble)
    assert_type(engine.preamble_for("a"), tuple[int, ...])
    prompt = Prompt(
        [Segment("Answer:\n", "literal"), Segment("a", "document", name="d"), Segment("?")]
    )
    assert_type(prompt.segments, tuple[Segment, ...])
    params = SamplingParams(max_tokens=4, stop=["\n"], grammar=Grammar.json({"type": "object"}))
    answer = engine.generate(prompt, params, reuse="high", repair=0.2)
    assert_type(answer, Generation)
    assert_type(answer.report, Report)
    assert_type(answer.report.segments, tuple[SegmentReport, ...])
    assert_type(answer.report.fallback_reason, str | None)
    assert_type(answer.report.repaired_rows, tuple[int, ...])
    assert_type(answer.report.segments[0].preamble_tokens, int)
    read = engine.prefill(prompt)
    assert_type(read, Prefill)
    assert_type(read.logits, torch.Tensor)
    assert_type(engine.stream(prompt), Generator[Chunk, None, None])
    assert_type(engine.astream(prompt), AsyncGenerator[Chunk, None])
    assert_type(engine.forget(["a"]), ForgetReport)
    assert_type(engine.stats(), EngineStats)
    for report in engine.reports:
        assert_type(report, Report)
    return answer.text


async def ask_later(engine: PromptCacheEngine) -> Generation:
    return await engine.agenerate(Prompt.from_text("?"), SamplingParams(max_tokens=1))


def talk(engine: PromptCacheEngine) -> Prompt:
    tool = Tool("weather", "Tells the weather.", {"type": "object", "properties": {}})
    assert_type(engine.tool_format, ToolFormat)
    return engine.prompt_from_chat([Message("user", [Segment("Hello")])], [tool])


def from_schema(engine: PromptCacheEngine) -> Prompt:
    name = engine.add_schema('<schema name="s"><module name="m">Text.</module></schema>')
    assert_type(name, str)
    assert_type(engine.encode_schema(name, progress=False), EncodeReport)
    return engine.prompt_from_pml('<prompt schema="s"><m/> Go.</prompt>', positions="compact")


def look_up(store: ModuleStore, engine: PromptCacheEngine) -> Hit | None:
    remote = RedisStore("redis://localhost", ttl_s=60)
    for lasting in (remote, ObjectStore("memory://states"), DiskStore("states")):
        try:
            lasting.check()
        except PromptCacheError as error:
            assert_type(str(error), str)
    assert_type(engine.store, ModuleStore)
    return None


def langchain(documents: list[Document], vectors: InMemoryVectorStore) -> str:
    llm = LangChainLLM(
        model="builtin:tiny-rag", reuse="balanced", store="memory", max_tokens=8, repair=64
    )
    assert_type(llm.engine, Engine)
    assert_type(llm.cache_documents(documents), EncodeReport)
    template = LangChainTemplate.from_template("From {context}: {question}")
    assert_type(llm.schema_for(template, lengths={"question": 8}), str)
    chat = ChatPromptCache(engine=llm.engine, temperature=0.0)
    assert_type(chat.invoke("Hello"), AIMessage)
    searched: VectorStore = track(vectors)
    assert_type(searched.similarity_search("Hello"), list[Document])
    return llm.invoke("Hello")


def llama_index(nodes: list[TextNode]) -> str:
    llm = LlamaIndexLLM(
        model="builtin:tiny-rag", store="./states", preamble=Preamble.none(), repair=0.2
    )
    assert_type(llm.engine, Engine)
    assert_type(llm.cache_documents(nodes, progress=False), EncodeReport)
    PromptCachePrecompute(llm=llm)
    PromptCacheSynthesizer(llm)
    return llm.complete("Hello").text


@prompt_program(lengths={"city": 8})
def trip(city: str, *, brief: bool = False) -> Iterator[str]:
    yield f"Plan a trip to {city}."
    if brief:
        yield " Be brief."


def templates() -> list[Prompt]:
    assert_type(trip.pml, str)
    assert isinstance(trip, PromptProgram)
    jinja = JinjaTemplate("Go to {{ city }}.", name="go", lengths={"city": 8})
    return [
        trip.render("Oslo", brief=True),
        jinja.render(city="Oslo"),
        FormatTemplate("Go to {city}.").render(city="Oslo"),
    ]
