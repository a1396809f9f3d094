"""The Redis store against a real server that is killed, full, slow or lying."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from pcache_core import MemoryStore, OptionError, TieredStore
from pcache_core.store import redis as redis_store
from pcache_core.store.redis import CHUNK_BYTES, RedisStore
from redis_server import Server
from stored_states import holds, make


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path)
    yield running
    running.kill()


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    with redis.Redis(port=server.port) as connection:
        yield connection


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def soon_again() -> None:
    """Until a store that saw an outage tries again."""
    time.sleep(redis_store.RETRY_S + 0.05)


LARGE = make(1, 2, copies=7_000)  # more than three chunks


def test_a_large_state_is_kept_in_chunks(server: Server, client: redis.Redis) -> None:
    RedisStore(server.url).put(*LARGE)
    lengths = sorted(client.strlen(name) for name in client.keys("*:*:*:*"))
    assert len(lengths) > 3
    assert lengths[1:] == [CHUNK_BYTES] * (len(lengths) - 1)


def test_a_state_written_again_replaces_its_chunks(server: Server, client: redis.Redis) -> None:
    store = RedisStore(server.url)
    store.put(*LARGE)
    before = client.dbsize()
    store.put(*LARGE)
    assert client.dbsize() == before
    assert store.get(LARGE[0]) is not None


def test_states_expire_with_all_their_chunks(server: Server, client: redis.Redis) -> None:
    RedisStore(server.url, ttl_s=100).put(*LARGE)
    lives = sorted(client.ttl(name) for name in client.keys("*"))
    assert 90 <= lives[0] <= 100
    assert all(100 < life <= 160 for life in lives[1:])
    RedisStore(server.url).put(*LARGE)
    assert {client.ttl(name) for name in client.keys("*")} == {-1}


def test_chunks_of_a_writer_that_died_expire_and_are_never_read(
    server: Server, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RedisStore(server.url)
    key, state = LARGE
    monkeypatch.setattr(redis_store, "_BATCH_CHUNKS", 1)
    sent = 0
    execute = redis.client.Pipeline.execute

    def dying(pipeline: Any, *arguments: Any) -> Any:
        nonlocal sent
        sent += 1
        if sent > 2:
            raise redis.ConnectionError("killed")
        return execute(pipeline, *arguments)

    monkeypatch.setattr(redis.client.Pipeline, "execute", dying)
    assert not store.put(key, state)
    monkeypatch.undo()
    assert client.dbsize() == 2
    assert all(0 < client.ttl(name) <= 600 for name in client.keys("*"))
    assert RedisStore(server.url).get(key) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest", "contradiction", "type", "nothing"])
def test_damage_is_a_miss_and_goes(
    server: Server, client: redis.Redis, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = RedisStore(server.url)
    key, state = LARGE
    store.put(key, state)
    name = f"pcache:{key.digest}"
    chunk = sorted(client.keys(f"{name}:*"))[1]
    if damage == "flip":
        client.setrange(chunk, 77, b"\x55\xaa")
    elif damage == "cut":
        client.set(chunk, client.getrange(chunk, 0, 999))
    elif damage == "manifest":
        client.set(name, "../../etc/passwd")
    elif damage == "contradiction":
        client.set(name, f"{'0' * 16}:9999999:10")
    elif damage == "type":
        client.delete(name)
        client.lpush(name, "list")
    else:
        client.set(name, "")
    assert store.get(key) is None
    assert store.contains(key) is False
    assert store.put(key, state)
    assert holds(store, key, state)


def test_a_chunk_that_the_server_evicted_is_a_miss_and_is_written_again(
    server: Server, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    store = RedisStore(server.url)
    key, state = LARGE
    store.put(key, state)
    client.delete(client.keys(f"pcache:{key.digest}:*")[0])
    assert store.get(key) is None
    assert warnings(caplog) == []
    assert store.put(key, state)
    assert store.get(key) is not None


def test_no_server_is_a_miss_with_one_warning_and_no_password_in_it(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.kill()
    store = RedisStore(f"redis://:secret@127.0.0.1:{server.port}/0")
    key, state = make(1, 2)
    assert store.get(key) is None
    assert not store.put(key, state)
    assert not store.contains(key)
    store.delete(key)
    soon_again()
    assert store.get(key) is None
    (warning,) = warnings(caplog)
    assert "redis://127.0.0.1" in warning
    assert "secret" not in warning
    stats = store.stats()
    assert (stats.misses, stats.states, stats.nbytes) == (2, None, None)
    assert stats.failures == 2


def test_a_server_that_comes_back_is_used_again(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = RedisStore(server.url)
    key, state = LARGE
    assert store.put(key, state)
    server.kill()
    assert store.get(key) is None
    server.start()
    soon_again()
    assert store.get(key) is None  # it kept nothing
    assert store.put(key, state)
    assert store.get(key) is not None
    assert len(warnings(caplog)) == 1
    assert any("works again" in record.getMessage() for record in caplog.records)


def test_a_restart_between_two_calls_goes_unnoticed(server: Server) -> None:
    """A connection that died is made anew within the call."""
    store = RedisStore(server.url)
    store.put(*make(1, 2))
    server.kill()
    server.start()
    assert store.put(*make(1, 2))
    assert store.stats().failures == 0


def test_a_server_that_does_not_answer_costs_one_time_out(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        store = RedisStore(f"redis://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
        started = time.monotonic()
        assert [store.get(make(n, n)[0]) for n in range(20)] == [None] * 20
        assert time.monotonic() - started < 0.9
    assert len(warnings(caplog)) == 1


def test_a_full_server_keeps_serving_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(tmp_path, "--maxmemory", "6mb", "--maxmemory-policy", "noeviction")
    try:
        store = RedisStore(server.url)
        small = make(1, 2)
        assert store.put(*small)
        kept = [store.put(*make(n, n, copies=7_000)) for n in range(3)]
        assert kept[-1] is False
        assert store.get(small[0]) is not None
    finally:
        server.kill()
    assert len(warnings(caplog)) == 1
    assert "writing states" in warnings(caplog)[0]


def test_as_a_tier_an_outage_loses_no_request(server: Server) -> None:
    store = TieredStore([MemoryStore(), RedisStore(server.url)])
    key, state = make(1, 2)
    server.kill()
    assert store.put(key, state)
    store.flush()
    hit = store.get(key)
    assert hit is not None
    assert hit.tier == "memory"
    assert store.get(make(3, 4)[0]) is None


def test_fewer_bits_and_a_key(server: Server) -> None:
    key, state = make(1, 2, copies=500)
    quantised = RedisStore(server.url, storage_dtype="int8", hmac_key=b"x" * 16)
    assert quantised.put(key, state)
    assert RedisStore(server.url).get(key) is None
    hit = quantised.get(key)
    assert hit is not None
    assert (hit.state.keys[0] - state.keys[0]).abs().max() < 0.05
    assert RedisStore(server.url, storage_dtype="int8").get(key) is None


BAD_OPTIONS = [
    "socket_tmeout=3", "socket_timeout=soon", "socket_timeout=-1", "socket_timeout=0",
    "socket_timeout=nan", "db=first", "db=-1", "max_connections=0", "max_connections=few",
    "protocol=7", "encoding=nothing", "ssl_cert_reqs=none", "retry_on_error=x",
    "health_check_interval=-1", "connection_class=x", "db=", "client_name=a%20b",
]  # fmt: skip
BAD_TLS = ["ssl_cert_reqs=sometimes", "ssl_check_hostname=perhaps", "ssl_min_version=x"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"url": "localhost"},
        {"url": "http://localhost"},
        {"url": "redis://localhost:many"},
        {"url": "redis://localhost:70000"},
        {"url": "redis://localhost:0"},
        {"url": "redis://localhost/first"},
        {"url": "redis://localhost/-1"},
        {"url": "redis://localhost/0/1"},
        {"url": "redis://" + "a" * 70},
        {"url": "redis://a..b"},
        {"url": "redis://localhost#0"},
        {"url": "redis://local host"},
        {"url": "unix://"},
        {"url": "unix:///a%00b"},
        {"url": "redis://\udcff"},
        {"url": b"redis://localhost"},
        {"url": None},
        *({"url": f"redis://localhost?{option}"} for option in BAD_OPTIONS),
        *({"url": f"rediss://localhost?{option}"} for option in BAD_TLS),
        {"url": "redis://localhost", "ttl_s": 0},
        {"url": "redis://localhost", "ttl_s": 1.5},
        {"url": "redis://localhost", "ttl_s": 2**63},
        {"url": "redis://localhost", "ttl_s": "60"},
        {"url": "redis://localhost", "ttl_s": True},
        {"url": "redis://localhost", "timeout_s": 0},
        {"url": "redis://localhost", "timeout_s": float("nan")},
        {"url": "redis://localhost", "timeout_s": float("inf")},
        {"url": "redis://localhost", "timeout_s": "2"},
        {"url": "redis://localhost", "storage_dtype": "int4"},
        {"url": "redis://localhost", "hmac_key": b"short"},
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        RedisStore(**arguments)


@pytest.mark.parametrize(
    "url", ["redis://:pa#ss@localhost", "redis://:pass@localhost?password=", "redis://:pass@a..b"]
)
def test_no_refusal_quotes_a_password(url: str) -> None:
    with pytest.raises(OptionError) as raised:
        RedisStore(url)
    assert "pa" not in str(raised.value).replace("password", "").replace("path", "")


@pytest.mark.parametrize("option", ["decode_responses=true", "protocol=3", "socket_timeout=1.5"])
def test_options_that_are_accepted_change_no_state(server: Server, option: str) -> None:
    store = RedisStore(f"{server.url}/0?{option}")
    key, state = LARGE
    assert store.put(key, state)
    assert holds(store, key, state)
    store.delete(key)
    assert store.stats().failures == 0


@pytest.mark.parametrize("kind", ["list", "hash", "set", "stream"])
@pytest.mark.parametrize("place", ["manifest", "chunk"])
def test_another_type_under_a_name_is_a_miss_that_heals(
    server: Server, client: redis.Redis, kind: str, place: str
) -> None:
    store = RedisStore(server.url)
    key, state = LARGE
    other, other_state = make(5, 6)
    store.put(key, state)
    store.put(other, other_state)
    name = f"pcache:{key.digest}"
    if place == "chunk":
        name = sorted(client.keys(f"{name}:*"))[1]
    client.delete(name)
    make_it: dict[str, Any] = {
        "list": lambda: client.lpush(name, "x"),
        "hash": lambda: client.hset(name, "x", "y"),
        "set": lambda: client.sadd(name, "x"),
        "stream": lambda: client.xadd(name, {"x": "y"}),
    }
    make_it[kind]()
    first, second = store.get_many([key, other])
    assert first is None
    assert second is not None
    assert store.put(key, state)
    assert holds(store, key, state)
    store.delete(key)
    store.delete(other)
    assert store.stats().failures == 0
    left = client.keys("*")  # nobody knows of the chunks of a manifest that was lost
    assert left == [] if place == "chunk" else name.encode() not in left
