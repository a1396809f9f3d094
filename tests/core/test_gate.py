"""How many requests work and wait: in order, bounded, in time, and never for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pcache_core import CausalLM, Prompt, PromptCacheEngine, SamplingParams
from pcache_core.errors import DeadlineExceededError, OptionError, OverloadedError
from pcache_core.scheduler import Gate

PROMPT = Prompt.from_text("Who keeps bees? A:")
SHORT = SamplingParams(max_tokens=4)


def long(timeout_s: float | None = None) -> SamplingParams:
    return SamplingParams(max_tokens=400, temperature=1.0, seed=1, timeout_s=timeout_s)


@pytest.fixture(scope="module")
def llama(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm("llama", seed=5)


@pytest.fixture
def held(llama: CausalLM) -> Iterator[threading.Event]:
    """No forward begins before this is set."""
    may_go = threading.Event()

    def wait(*_: object) -> None:
        assert may_go.wait(20)

    with llama.model.register_forward_pre_hook(wait):
        yield may_go
        may_go.set()


def at_hand(engine: PromptCacheEngine) -> tuple[int, int]:
    """Requests that are at work, and those that wait."""
    stats = engine.stats()
    return stats.running, stats.waiting


def wait_until(is_true: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.001)


def test_one_request_too_many_is_refused_at_once_and_the_others_are_answered(
    llama: CausalLM, held: threading.Event
) -> None:
    engine = PromptCacheEngine(llama, reuse="off", max_running=2, max_waiting=3)
    with ThreadPoolExecutor(5) as threads:
        answers = [threads.submit(engine.generate, PROMPT, SHORT) for _ in range(5)]
        wait_until(lambda: at_hand(engine) == (2, 3))
        with pytest.raises(OverloadedError, match="2 requests are at work and 3 wait.*max_waiting"):
            engine.generate(PROMPT, SHORT)
        with pytest.raises(OverloadedError):
            engine.prefill(PROMPT)
        with pytest.raises(OverloadedError):
            asyncio.run(engine.agenerate(PROMPT, SHORT))
        held.set()
        texts = {answer.result(20).token_ids for answer in answers}
    assert len(texts) == 1
    assert at_hand(engine) == (0, 0)
    assert engine.generate(PROMPT, SHORT).token_ids in texts


async def test_tasks_that_wait_count_and_leave_when_they_are_cancelled(
    llama: CausalLM, held: threading.Event
) -> None:
    engine = PromptCacheEngine(llama, reuse="off", max_running=1, max_waiting=2)
    tasks = [asyncio.create_task(engine.agenerate(PROMPT, SHORT)) for _ in range(3)]
    await asyncio.sleep(0.05)
    with pytest.raises(OverloadedError):
        await engine.agenerate(PROMPT, SHORT)
    tasks[1].cancel()
    await asyncio.sleep(0.05)
    fourth = asyncio.create_task(engine.agenerate(PROMPT, SHORT))
    await asyncio.sleep(0.05)
    held.set()
    assert (await tasks[0]).token_ids == (await tasks[2]).token_ids == (await fourth).token_ids
    assert at_hand(engine) == (0, 0)


def test_requests_begin_in_the_order_they_came(llama: CausalLM) -> None:
    gate = Gate(1, 100)
    first = gate.queue(0.0)
    gate.start(first, lambda: None)
    begun: list[int] = []

    def work(number: int, is_in_line: threading.Event) -> None:
        place = gate.queue(0.0)
        gate.start(place, is_in_line.set)
        begun.append(number)
        gate.leave(place)

    threads = []
    for number in range(8):
        is_in_line = threading.Event()
        threads.append(threading.Thread(target=work, args=(number, is_in_line)))
        threads[-1].start()
        assert is_in_line.wait(20)
    gate.leave(first)
    for thread in threads:
        thread.join(20)
    assert begun == list(range(8))


def test_streams_that_nobody_reads_on_hold_up_nobody(llama: CausalLM) -> None:
    engine = PromptCacheEngine(llama, reuse="off", max_running=2, max_waiting=0)
    open_streams = [engine.stream(PROMPT, long()) for _ in range(6)]
    for stream in open_streams:
        next(stream)
    assert engine.generate(PROMPT, SHORT).token_ids
    pieces = [next(stream).token_ids for stream in open_streams for _ in range(3)]
    assert all(pieces)
    for stream in open_streams:
        stream.close()
    assert at_hand(engine) == (0, 0)


def test_an_answer_that_takes_too_long_ends_with_what_was_allowed(llama: CausalLM) -> None:
    engine = PromptCacheEngine(llama, reuse="fast")
    expected = engine.generate(PROMPT, SHORT).token_ids
    pieces = []

    def read_on() -> None:
        for chunk in engine.stream(PROMPT, long(timeout_s=0.5)):
            pieces.append(chunk)
            time.sleep(0.02)

    with pytest.raises(DeadlineExceededError, match=r"timeout_s=0\.5; allow more time"):
        read_on()
    assert pieces, "what was there in time was not handed out"
    assert isinstance(DeadlineExceededError(""), TimeoutError)
    assert engine.generate(PROMPT, SHORT).token_ids == expected


def test_a_request_that_waits_too_long_for_its_turn_is_given_up(
    llama: CausalLM, held: threading.Event
) -> None:
    engine = PromptCacheEngine(llama, reuse="off", max_running=1)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(engine.generate, PROMPT, SHORT)
        wait_until(lambda: at_hand(engine) == (1, 0))
        with pytest.raises(DeadlineExceededError):
            engine.generate(PROMPT, SamplingParams(max_tokens=4, timeout_s=0.1))
        with pytest.raises(DeadlineExceededError):
            asyncio.run(engine.agenerate(PROMPT, SamplingParams(max_tokens=4, timeout_s=0.1)))
        held.set()
        assert first.result(20).token_ids
    assert at_hand(engine) == (0, 0)


@pytest.mark.parametrize("options", [{"max_running": 0}, {"max_waiting": -1}, {"max_running": 1.5}])
def test_limits_out_of_range_are_refused(llama: CausalLM, options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(options))}=.*or more"):
        PromptCacheEngine(llama, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout_s", [0, -1, float("inf"), "soon", True])
def test_a_timeout_is_a_positive_number(timeout_s: object) -> None:
    with pytest.raises(OptionError, match="timeout_s"):
        SamplingParams(timeout_s=timeout_s)  # type: ignore[arg-type]
