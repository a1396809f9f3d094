"""What every store that lasts has to do: in a folder, on a server, behind fsspec."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import redis

from pcache_core import DiskStore, MemoryStore, TieredStore
from pcache_core.store import ModuleStore
from pcache_core.store.object import ObjectStore
from pcache_core.store.redis import RedisStore
from redis_server import Server
from stored_states import holds, make, same

LARGE = make(1, 2, copies=7_000)  # more than three chunks on a server, more than one read


class Place:
    """Where states are kept. url: of fsspec's, or of a server."""

    def __init__(self, make_store: Callable[[], Any], url: str) -> None:
        self.open = make_store
        self._url = url

    def names(self) -> list[Any]:
        """What stands there, under whatever names."""
        if self._url.startswith("redis"):
            with redis.Redis.from_url(self._url) as client:
                return list(client.keys("*"))
        files, root = fsspec.core.url_to_fs(self._url)
        return list(files.find(root)) if files.exists(root) else []

    def rename(self, one: str, other: str) -> None:
        """Have what is kept under one digest stand under another."""
        if self._url.startswith("redis"):
            with redis.Redis.from_url(self._url) as client:
                for name in client.keys(f"pcache:{one}*"):
                    client.rename(name, name.replace(one.encode(), other.encode()))
            return
        (path,) = self.names()
        files, _ = fsspec.core.url_to_fs(self._url)
        new = path.replace(one, other).replace(f"/{one[:2]}/", f"/{other[:2]}/")
        files.makedirs(files._parent(new), exist_ok=True)
        files.mv(path, new)


@pytest.fixture(params=["folder", "server", "fsspec in memory", "fsspec in a folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    url = f"file://{tmp_path}/deep/states"
    if request.param == "server":
        server = Server(tmp_path)
        yield Place(lambda: RedisStore(server.url), server.url)
        server.kill()
    elif request.param == "folder":
        yield Place(lambda: DiskStore(tmp_path / "deep" / "states"), url)
    else:
        url = f"memory://{uuid.uuid4().hex}" if "memory" in request.param else url
        yield Place(lambda: ObjectStore(url), url)


@pytest.mark.parametrize("pair", [make(1, 2), LARGE], ids=["small", "large"])
def test_a_state_comes_back_bit_by_bit_in_another_store_object(place: Place, pair: Any) -> None:
    key, state = pair
    store = place.open()
    assert isinstance(store, ModuleStore)
    assert store.get(key) is None
    assert not store.contains(key)
    assert store.put(key, state)
    again = place.open()
    assert again.contains(key)
    assert holds(again, key, state)
    assert again.get(key).tier == ("disk" if isinstance(store, DiskStore) else "remote")
    assert (again.stats().hits, again.stats().misses) == (2, 0)
    store.delete(key)
    store.delete(key)
    assert store.get(key) is None
    assert place.names() == []
    assert store.stats().failures == 0


def test_several_states_come_in_order_each_once(place: Place) -> None:
    store = place.open()
    pairs = [make(n, n) for n in range(5)]
    for key, state in pairs[::2]:
        store.put(key, state)
    hits = store.get_many([key for key, _ in (*pairs, pairs[0])])
    assert [hit is not None for hit in hits] == [True, False, True, False, True, True]
    assert all(same(hits[n].state, pairs[n][1]) for n in (0, 2, 4))
    assert (store.stats().hits, store.stats().misses) == (4, 2)
    assert store.get_many([]) == []


def test_another_models_state_under_the_right_name_is_a_miss_and_goes(place: Place) -> None:
    store = place.open()
    (key, _), (other, state) = make(1, 2), make(1, 3)
    store.put(other, state)
    place.rename(other.digest, key.digest)
    assert store.contains(key)
    assert store.get(key) is None
    assert not store.contains(key)


def test_as_a_tier_it_serves_what_memory_has_not(place: Place) -> None:
    key, state = make(1, 2)
    store = TieredStore([MemoryStore(), place.open()])
    store.put(key, state)
    store.close()
    fresh = TieredStore([MemoryStore(), place.open()])
    tiers = [hit.tier for hit in (fresh.get(key), fresh.get(key)) if hit]
    assert tiers == ["disk" if isinstance(store.tiers[1], DiskStore) else "remote", "memory"]
