"""The store behind fsspec: in memory, in a folder, and on storage that fails."""

from __future__ import annotations

import logging
import struct
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pcache_core import OptionError
from pcache_core.store import object as object_store
from pcache_core.store.object import ObjectStore
from stored_states import make

LARGE = make(1, 2, copies=4_000)  # more than one read


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/states"
    return f"memory://{uuid.uuid4().hex}"


def objects(url: str) -> list[str]:
    files, root = fsspec.core.url_to_fs(url)
    return sorted(files.find(root)) if files.exists(root) else []


def rewrite(url: str, content: bytes) -> None:
    files, _ = fsspec.core.url_to_fs(url)
    (path,) = objects(url)
    files.pipe_file(path, content)


@pytest.mark.parametrize("pair", [make(1, 2), LARGE], ids=["small", "large"])
def test_damage_is_a_miss_and_goes(url: str, pair: Any) -> None:
    key, state = pair
    store = ObjectStore(url)
    store.put(key, state)
    files, _ = fsspec.core.url_to_fs(url)
    content = files.cat_file(objects(url)[0])
    cases = [content[:n] for n in (0, 7, 100, len(content) // 2, len(content) - 1)]
    cases += [content + b"\0", struct.pack("<Q", 2**42) + content[8:], bytes(len(content))]
    cases += [content[:at] + b"\x99" + content[at + 1 :] for at in (3, 90, len(content) - 40)]
    for damaged in cases:
        rewrite(url, damaged)
        assert store.get(key) is None
        assert objects(url) == []
        assert store.put(key, state)
        assert store.get(key) is not None
    assert store.stats().damaged == len(cases)


class Failing(MemoryFileSystem):
    """Storage that fails when told, half way through a write, with an error of its own."""

    protocol = "failing"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    fails = False

    class Broken(Exception):
        pass

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> Any:
        if Failing.fails:
            raise Failing.Broken("out of order")
        return super().cat_file(path, *arguments, **options)

    def pipe_file(self, path: str, value: bytes, *arguments: Any, **options: Any) -> Any:
        if Failing.fails:
            super().pipe_file(path, value[: len(value) // 2])
            raise Failing.Broken("out of order")
        return super().pipe_file(path, value, *arguments, **options)


def test_an_outage_is_a_miss_said_once_and_leaves_nothing_half_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fsspec.register_implementation("failing", Failing, clobber=True)
    store = ObjectStore("failing://states")
    assert store.put(*make(1, 1))
    Failing.fails = True
    key, state = make(1, 2)
    assert not store.put(key, state)
    assert [store.get(k) for k in (key, make(1, 1)[0])] == [None, None]
    Failing.fails = False
    assert len(objects("failing://states")) == 1
    time.sleep(object_store.RETRY_S + 0.05)
    assert store.get(key) is None
    assert store.get(make(1, 1)[0]) is not None
    assert store.put(key, state)
    assert sum(r.levelno >= logging.WARNING for r in caplog.records) == 1


@pytest.mark.parametrize("bad", ["states", "nosuch://x", None])
def test_bad_urls_are_refused(bad: Any) -> None:
    with pytest.raises(OptionError):
        ObjectStore(bad)
