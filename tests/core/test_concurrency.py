"""Requests that run at the same time: the same answers, shared work, nothing left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from pcache_core import (
    CausalLM,
    ContextLengthError,
    MemoryStore,
    Prompt,
    PromptCacheEngine,
    SamplingParams,
    Segment,
)

OPENING = Segment("Answer from the notes.\n", "literal")
DOCS = [f"{name} keeps {thing} in the {place}." for name, thing, place in zip(
    ("Ann", "Ben", "Cem", "Di"), ("bees", "boats", "mills", "owls"),
    ("north", "south", "east", "west"), strict=True,
)]  # fmt: skip
PARAMS = SamplingParams(max_tokens=12)


def prompt(number: int) -> Prompt:
    order = [DOCS[(number + shift) % len(DOCS)] for shift in range(len(DOCS))]
    documents = [Segment(text, "document") for text in order]
    return Prompt([OPENING, *documents, Segment(f"\nWho {number}? A:", "argument")])


def encoded_tokens(lm: CausalLM) -> int:
    """Of the documents and of the opening, its first token included."""
    return 1 + sum(lm.count_tokens(text) for text in (OPENING.text, *DOCS))


@pytest.fixture(scope="module")
def llama(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm("llama", seed=5)


@pytest.mark.parametrize("mode", ["off", "fast", "balanced"])
def test_sixteen_threads_get_the_answers_of_one_after_another_from_fewer_forwards(
    llama: CausalLM, mode: str
) -> None:
    forwards: list[object] = []
    alone = PromptCacheEngine(llama, reuse=mode, repair=16)  # type: ignore[arg-type]
    alone.encode(DOCS, progress=False)
    expected = [alone.generate(prompt(number), PARAMS).token_ids for number in range(16)]
    engine = PromptCacheEngine(llama, alone.store, mode, repair=16)  # type: ignore[arg-type]
    counting = llama.model.register_forward_pre_hook(lambda *call: forwards.append(call[0]))
    with counting, ThreadPoolExecutor(16) as threads:
        answers = list(
            threads.map(lambda number: engine.generate(prompt(number), PARAMS), range(16))
        )
    assert [answer.token_ids for answer in answers] == expected
    steps = sum(map(len, expected))
    assert len(forwards) < steps / 2, f"{len(forwards)} forwards for {steps} tokens"


def test_what_several_requests_miss_at_once_is_encoded_once(llama: CausalLM) -> None:
    engine = PromptCacheEngine(llama, reuse="fast")
    ready = threading.Barrier(8)

    def ask(number: int) -> object:
        ready.wait()
        return engine.generate(prompt(number), PARAMS)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(8)))
    assert sum(report.encoded_tokens for report in engine.reports) == encoded_tokens(llama)
    alone = PromptCacheEngine(llama, engine.store, reuse="fast")
    assert alone.generate(prompt(3), PARAMS).report.encoded_tokens == 0


class Forgetful(MemoryStore):
    """Keeps nothing: what a request encodes serves those alone that wait for it just then."""

    def put(self, *args: object) -> bool:
        return False


def test_a_store_that_keeps_nothing_makes_nobody_wait_for_ever(llama: CausalLM) -> None:
    engine = PromptCacheEngine(llama, Forgetful(), reuse="fast")
    with ThreadPoolExecutor(6) as threads:
        answers = list(
            threads.map(lambda number: engine.generate(prompt(number), PARAMS), range(6))
        )
    alone = PromptCacheEngine(llama, reuse="fast")
    expected = [alone.generate(prompt(number), PARAMS).token_ids for number in range(6)]
    assert [answer.token_ids for answer in answers] == expected
    encoded = [answer.report.encoded_tokens for answer in answers]
    assert 0 < max(encoded) <= encoded_tokens(llama)


async def test_two_hundred_tasks_get_their_own_answers(llama: CausalLM) -> None:
    engine = PromptCacheEngine(llama, reuse="fast")
    short = SamplingParams(max_tokens=3)
    expected = [engine.generate(prompt(number), short).text for number in range(8)]
    answers = await asyncio.gather(
        *(engine.agenerate(prompt(number % 8), short) for number in range(200))
    )
    assert [answer.text for answer in answers] == [expected[number % 8] for number in range(200)]


async def test_an_error_reaches_the_task_that_caused_it(llama: CausalLM) -> None:
    engine = PromptCacheEngine(llama, reuse="fast")
    results = await asyncio.gather(
        engine.agenerate(prompt(1), PARAMS),
        engine.agenerate(Prompt.from_text("a" * 5000)),
        return_exceptions=True,
    )
    assert results[0].token_ids  # type: ignore[union-attr]
    assert isinstance(results[1], ContextLengthError)


def test_an_event_loop_that_ends_in_mid_stream_leaves_the_engine_usable(llama: CausalLM) -> None:
    engine = PromptCacheEngine(llama, reuse="fast")
    endless = SamplingParams(max_tokens=300, temperature=1.0, seed=1)

    async def begin() -> None:
        await anext(engine.astream(prompt(1), endless))

    asyncio.run(begin())
    expected = PromptCacheEngine(llama, reuse="off").generate(prompt(2), PARAMS)
    assert engine.generate(prompt(2), PARAMS, reuse="off").token_ids == expected.token_ids
