"""`check`: whether anything can be kept, for programs that want to know at their start."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import fsspec
import pytest

from pcache_core import DiskStore, MemoryStore, StoreError
from pcache_core.store import LastingStore
from pcache_core.store.object import ObjectStore
from pcache_core.store.redis import RedisStore
from redis_server import Server


def test_a_store_that_works_passes_and_keeps_nothing_of_it(tmp_path: Path) -> None:
    server = Server(tmp_path)
    root = f"memory://{uuid.uuid4().hex}"
    stores = (DiskStore(tmp_path / "states"), RedisStore(server.url), ObjectStore(root))
    for store in stores:
        assert isinstance(store, LastingStore)
        store.check()
        assert store.stats().failures == 0
    assert os.listdir(tmp_path / "states") == []
    assert fsspec.filesystem("memory").find(root) == []
    server.kill()


def test_memory_does_not_last() -> None:
    assert not isinstance(MemoryStore(), LastingStore)


def test_a_folder_that_is_gone_or_read_only_is_an_error(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "states")
    (tmp_path / "states").rmdir()
    with pytest.raises(StoreError, match=r"states' can't be written: No such file or directory;"):
        store.check()


def test_a_server_that_does_not_answer_or_takes_nothing_is_an_error(tmp_path: Path) -> None:
    server = Server(tmp_path, "--maxmemory", "1", "--maxmemory-policy", "noeviction")
    store = RedisStore(server.url)
    with pytest.raises(StoreError, match="can't be used: .*maxmemory"):
        store.check()
    server.kill()
    with pytest.raises(StoreError, match=f"127.0.0.1:{server.port} can't be used: .*refused"):
        RedisStore(server.url.replace("redis://", "redis://user:secret@")).check()


def test_no_message_has_a_password() -> None:
    with pytest.raises(StoreError) as raised:
        RedisStore("redis://user:secret@127.0.0.1:1").check()
    assert "secret" not in str(raised.value)


def test_an_object_store_that_can_not_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="can't be written: .*check its address"):
        ObjectStore(f"file://{tmp_path}/file").check()
