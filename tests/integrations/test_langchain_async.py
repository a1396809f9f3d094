"""Calls that are given up, and an event loop that never waits for the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessageChunk

from open_streams import Watched, eventually
from pcache_core import Grammar
from pcache_core.errors import ContextLengthError
from pcache_integrations._engines import load_lm
from pcache_integrations.langchain import ChatPromptCache, PromptCacheLLM

LONG = {"max_tokens": 400, "temperature": 2.0, "seed": 0, "repetition_penalty": 1.5}

ENDLESS, LONGER = (Grammar.lark(f"start: /[a-z ]{{{least},}}/") for least in (150, 1500))


@pytest.fixture
def engine() -> Watched:
    return Watched(load_lm("builtin:tiny-rag"))


@pytest.fixture(params=[ChatPromptCache, PromptCacheLLM])
def model(request: pytest.FixtureRequest, engine: Watched) -> Any:
    return request.param(engine=engine, **LONG)


async def test_a_cancelled_task_frees_its_slot(model: Any, engine: Watched) -> None:
    task = asyncio.create_task(model.ainvoke("Hello", grammar=ENDLESS))
    await eventually(lambda: engine.open_streams == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: engine.open_streams == 0)
    assert not engine.reports


async def test_a_stream_that_is_left_frees_its_slot(model: Any, engine: Watched) -> None:
    stream: AsyncIterator[Any] = model.astream("Hello")
    await anext(stream)
    assert engine.open_streams == 1
    await stream.aclose()  # type: ignore[attr-defined]
    await eventually(lambda: engine.open_streams == 0)


def test_a_generator_that_is_closed_frees_its_slot(model: Any, engine: Watched) -> None:
    stream = model.stream("Hello")
    next(stream)
    assert engine.open_streams == 1
    stream.close()
    assert engine.open_streams == 0


async def test_a_timeout_frees_the_slot(model: Any, engine: Watched) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await model.ainvoke("Hello", grammar=ENDLESS)
    await eventually(lambda: engine.open_streams == 0)
    assert model.bind(max_tokens=2).invoke("Hello")


async def test_a_cancelled_batch_frees_its_slots(model: Any, engine: Watched) -> None:
    task = asyncio.create_task(model.abatch(["Hello", "Hi"], grammar=ENDLESS))
    await eventually(lambda: engine.open_streams == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: engine.open_streams == 0)
    assert not engine.reports


async def test_one_bad_prompt_of_a_batch_ends_the_others(model: Any, engine: Watched) -> None:
    with pytest.raises(ContextLengthError):
        await model.abatch(["Hello", "x y " * engine.lm.context_length], grammar=LONGER)
    await eventually(lambda: engine.open_streams == 0)
    assert not engine.reports


async def test_the_loop_ticks_while_many_calls_run(model: Any) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    clock = asyncio.create_task(tick())
    brief = model.bind(max_tokens=20)
    await asyncio.gather(*(brief.ainvoke(f"Hello {n}") for n in range(4)))
    during_calls, ticks = ticks, 0
    async for _ in brief.astream("Hello"):
        pass
    clock.cancel()
    assert during_calls > 80  # a blocked loop ticks once or twice in all
    assert ticks > 20


class Seen(BaseCallbackHandler):
    """What a tracer is told."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.chunks: list[Any] = []
        self.run_ids: set[Any] = set()
        self.metadata: dict[str, Any] = {}
        self.ended = 0

    def on_chat_model_start(self, serialized: Any, messages: Any, **about: Any) -> None:
        self.run_ids.add(about["run_id"])
        self.metadata = about["metadata"]

    def on_llm_new_token(self, token: str, *, chunk: Any = None, **about: Any) -> None:
        self.tokens.append(token)
        self.chunks.append(chunk)
        self.run_ids.add(about["run_id"])

    def on_llm_end(self, response: Any, **about: Any) -> None:
        self.ended += 1
        self.run_ids.add(about["run_id"])


@pytest.mark.parametrize("is_async", [False, True])
async def test_tracers_see_every_token_of_one_run(engine: Watched, is_async: bool) -> None:
    chat = ChatPromptCache(engine=engine, **{**LONG, "max_tokens": 12})
    seen, run_id = Seen(), uuid4()
    config: Any = {"callbacks": [seen], "run_id": run_id}
    if is_async:
        chunks = [chunk async for chunk in chat.astream("Hello", config)]
    else:
        chunks = list(chat.stream("Hello", config))
    assert "".join(seen.tokens) == "".join(chunk.text for chunk in chunks)
    assert all(isinstance(chunk.message, AIMessageChunk) for chunk in seen.chunks)
    assert (seen.run_ids, seen.ended) == ({run_id}, 1)
    expected = {
        "ls_provider": "pcache",
        "ls_model_name": "builtin:tiny-rag",
        "ls_model_type": "chat",
        "ls_temperature": 2.0,
        "ls_max_tokens": 12,
    }
    assert expected.items() <= seen.metadata.items()


async def test_events_hold_the_answer_once(engine: Watched) -> None:
    chat = ChatPromptCache(engine=engine, **{**LONG, "max_tokens": 12})
    events = [event async for event in chat.astream_events("Hello", version="v2")]
    streamed = [e["data"]["chunk"] for e in events if e["event"] == "on_chat_model_stream"]
    (end,) = [e["data"]["output"] for e in events if e["event"] == "on_chat_model_end"]
    assert "".join(chunk.text for chunk in streamed) == end.text
    assert end.response_metadata["model_name"] == "builtin:tiny-rag"
    assert end.response_metadata["model_provider"] == "pcache"
    assert [bool(chunk.usage_metadata) for chunk in streamed].count(True) == 1


def test_log_probabilities_come_in_the_shape_of_openais_chats(engine: Watched) -> None:
    chat = ChatPromptCache(engine=engine, max_tokens=4, reuse="off")
    invoked = chat.invoke("Hello", logprobs=True, top_logprobs=2)
    found = invoked.response_metadata["logprobs"]["content"]
    assert "".join(record["token"] for record in found) == invoked.text
    for record in found:
        assert record["logprob"] <= 0
        assert bytes(record["bytes"]).decode() == record["token"]
        assert [other["token"] for other in record["top_logprobs"]][0] == record["token"]
        assert len(record["top_logprobs"]) == 2
    first, *rest = chat.stream("Hello", logprobs=True, top_logprobs=2)
    for chunk in rest:
        first += chunk
    assert first.response_metadata["logprobs"]["content"] == found
    assert "logprobs" not in chat.invoke("Hello").response_metadata
