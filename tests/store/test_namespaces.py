"""Namespaces: the same one hits, another misses, and a miss looks like any other miss."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from pcache_core import (
    CausalLM,
    DiskStore,
    MemoryStore,
    ModuleStore,
    OptionError,
    Prompt,
    PromptCacheEngine,
    Segment,
    TieredStore,
)
from pcache_core.store.object import ObjectStore
from pcache_core.store.redis import RedisStore
from redis_server import Server
from stored_states import SPACE, make

SECRET = Segment("The codeword is heron, said the man by the mill.", "document", "secret")


PROMPT = Prompt([Segment("Read:\n", "literal"), SECRET, Segment("\nWhat is it? A:")])


@pytest.fixture(scope="module")
def lm(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm()


@pytest.fixture(params=["memory", "disk", "tiered", "redis", "object"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModuleStore]:
    if request.param == "redis":
        server = Server(tmp_path)
        yield RedisStore(server.url)
        server.kill()
        return
    yield {
        "memory": lambda: MemoryStore(),
        "disk": lambda: DiskStore(tmp_path),
        "tiered": lambda: TieredStore([MemoryStore(), DiskStore(tmp_path)]),
        "object": lambda: ObjectStore(f"memory://{tmp_path.name}"),
    }[request.param]()


def ask(lm: CausalLM, store: ModuleStore, namespace: str) -> str:
    engine = PromptCacheEngine(lm, store, "fast", namespace=namespace)
    return engine.prefill(PROMPT).report.segments[1].source


def test_the_same_namespace_hits_and_another_misses_in_every_store(
    lm: CausalLM, store: ModuleStore
) -> None:
    assert ask(lm, store, "ann") == "encoded"
    assert ask(lm, store, "ann") in ("memory", "disk", "remote")
    assert ask(lm, store, "ben") == "encoded"
    assert ask(lm, store, "ben") in ("memory", "disk", "remote")
    hits = store.stats().hits
    assert ask(lm, store, "ann.b") == "encoded"
    assert store.stats().hits == hits, "nothing comes from another namespace"


def test_ahead_of_time_as_well(lm: CausalLM, store: ModuleStore) -> None:
    own, other = (PromptCacheEngine(lm, store, namespace=name) for name in ("ann", "ben"))
    own.encode([SECRET.text], progress=False)
    assert own.encode([SECRET.text], progress=False).already_stored == 1
    assert other.encode([SECRET.text], progress=False).already_stored == 0


@pytest.mark.parametrize("kind", ["disk", "redis"])
def test_looking_for_what_another_namespace_has_is_as_much_work_as_for_what_nobody_has(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of the system is counted: no difference there, none to measure in time."""
    server = Server(tmp_path) if kind == "redis" else None
    store = RedisStore(server.url) if server else DiskStore(tmp_path)
    ann, ben = (replace(SPACE, namespace=name) for name in ("ann", "ben"))
    assert store.put(*make(1, 2, 3, space=ann, copies=50))
    keys = {
        "has": make(1, 2, 3, space=ann, copies=50)[0],
        "another has": make(1, 2, 3, space=ben, copies=50)[0],
        "nobody has": make(7, 8, 9, space=ben, copies=50)[0],
    }
    done: list[str] = []

    def counting(place: Any, name: str) -> None:
        call = getattr(place, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            done.append(name)
            return call(*arguments, **options)

        monkeypatch.setattr(place, name, counted)

    for name in ("stat", "open", "fstat", "utime", "preadv"):
        counting(os, name)
    for name in ("send_packed_command", "read_response"):
        counting(redis.connection.Connection, name)
    work = {}
    for whose, key in keys.items():
        done.clear()
        assert (store.get(key) is not None) == (whose == "has")
        work[whose] = list(done)
    if server:
        server.kill()
    assert work["another has"] == work["nobody has"]
    assert 0 < len(work["nobody has"]) < len(work["has"])


@pytest.mark.parametrize("bad", ["", "../x", "a/b", "a b", "-a", "é", "a" * 65, None, "a\n"])
def test_names_are_checked(lm: CausalLM, bad: Any) -> None:
    with pytest.raises(OptionError, match="namespace"):
        PromptCacheEngine(lm, namespace=bad)
