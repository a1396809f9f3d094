"""A plan's states are fetched together: round trips and reads are counted, not timed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from pcache_core import CausalLM, DiskStore, MemoryStore, Prompt, PromptCacheEngine, Segment
from pcache_core.kv.key import ModuleKey
from pcache_core.store import Hit, ModuleStore, TieredStore
from pcache_core.store.redis import RedisStore
from redis_server import Server
from stored_states import make

OPENING = Segment("Answer from the notes.\n", "literal")
TEXTS = [f"Note {n}: the river runs past mill number {n}, and on." for n in range(8)]
PROMPT = Prompt(
    [OPENING, *(Segment(text, "document") for text in TEXTS), Segment("\nWhere is the mill?")]
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path)
    yield running
    running.kill()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What a client sends and then waits for an answer to: one item a round trip."""
    trips: list[bytes] = []
    send = redis.connection.Connection.send_packed_command

    def counting(self: Any, command: Any, **options: Any) -> Any:
        packed = command if isinstance(command, bytes) else b"".join(command)
        if b"MGET" in packed or b"$3\r\nGET" in packed:
            trips.append(packed)
        return send(self, command, **options)

    monkeypatch.setattr(redis.connection.Connection, "send_packed_command", counting)
    return trips


@pytest.fixture(scope="module")
def lm(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm()


def encode_all(lm: CausalLM, store: ModuleStore) -> None:
    """The states of the documents, and of the opening, which a first prompt makes."""
    engine = PromptCacheEngine(lm, store, "fast")
    engine.encode(TEXTS, progress=False)
    engine.prefill(Prompt([OPENING, PROMPT.segments[1], Segment("?")]))


def test_all_states_of_a_prompt_come_in_one_question_and_one_answer(
    lm: CausalLM, server: Server, sent: list[bytes]
) -> None:
    """Names first, then bytes."""
    encode_all(lm, RedisStore(server.url))
    sent.clear()
    store = RedisStore(server.url)
    report = PromptCacheEngine(lm, store, "fast").prefill(PROMPT).report
    assert [s.source for s in report.segments if s.kind == "document"] == ["remote"] * len(TEXTS)
    assert report.encoded_tokens == 0
    assert sum(b"MGET" in packed for packed in sent) == 1
    assert len(sent) == 2


def test_memory_in_front_is_asked_first_and_the_server_once_for_the_rest(
    lm: CausalLM, server: Server, sent: list[bytes]
) -> None:
    encode_all(lm, RedisStore(server.url))
    engine = PromptCacheEngine(lm, TieredStore([MemoryStore(), RedisStore(server.url)]), "fast")
    few = Prompt([PROMPT.segments[0], *PROMPT.segments[1:4], PROMPT.segments[-1]])
    engine.prefill(few)
    sent.clear()
    moved = Prompt([PROMPT.segments[0], *PROMPT.segments[8:0:-1], PROMPT.segments[-1]])
    report = engine.prefill(moved).report
    sources = [s.source for s in report.segments if s.kind == "document"]
    assert sources == ["remote"] * 5 + ["memory"] * 3
    assert len(sent) == 2
    engine.prefill(PROMPT)
    assert len(sent) == 2


def test_a_store_of_the_users_own_is_asked_for_all_at_once(lm: CausalLM) -> None:
    class Counting(MemoryStore):
        asked: list[int] = []

        def get_many(self, keys: list[ModuleKey]) -> list[Hit | None]:
            self.asked.append(len(keys))
            return [self.get(key) for key in keys]

    store = Counting()
    encode_all(lm, store)
    store.asked.clear()
    PromptCacheEngine(lm, store, "fast").prefill(PROMPT)
    assert store.asked == [1 + len(TEXTS)]


def test_the_disk_is_told_of_every_file_before_the_first_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(tmp_path)
    pairs = [make(n, copies=2000) for n in range(6)]
    for key, state in pairs:
        store.put(key, state)
    for path in tmp_path.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(descriptor, [bytearray(1)], 2**18, os.RWF_NOWAIT)
            pytest.skip("this file system keeps its pages")
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
    events: list[str] = []
    advise = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *a: (events.append("told"), advise(*a)))
    opened = store.open_many([key for key, _ in pairs])
    assert events == ["told"] * 6
    assert all(opened)
    events.clear()
    for each in opened:
        assert each is not None
        each.rows.whole()
    store.open_many([key for key, _ in pairs])
    assert events == [], "what is in memory already need not be asked for"
