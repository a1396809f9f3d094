"""States of other versions: recognised, dropped, encoded again; never served, never a crash."""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import redis
import torch
import xxhash

from corpus import DOCUMENTS, OPENING
from pcache_core import CausalLM, DiskStore, ModuleStore, Prompt, PromptCacheEngine, Segment
from pcache_core.kv.key import FORMAT_VERSION, KeySpace
from pcache_core.kv.state import KVState, LayerShape, stack_layers
from pcache_core.store.inspect import Selection, clear_states, stored_states
from pcache_core.store.object import ObjectStore
from pcache_core.store.redis import RedisStore
from redis_server import Server
from stored_states import holds, make, same

FORMATS = Path(__file__).parent / "formats"


def of_version(content: bytes, version: int) -> bytes:
    """A state as another version might write it, with a checksum that fits.

    Version 1 named what a state was encoded after otherwise, one after this says more.
    """
    (length,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + length])
    metadata = table["__metadata__"]
    metadata["format"] = f"pcache-state-{version}"
    if version < FORMAT_VERSION:
        metadata["anchor_ids"] = metadata.pop("preamble_ids")
    else:
        metadata["compression"] = "none"
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % 64)
    body = struct.pack("<Q", len(header)) + header + content[8 + length : -16]
    return body + xxhash.xxh3_128(body).digest()


OTHER_VERSIONS: dict[str, Callable[[bytes], bytes]] = {
    "older": lambda content: of_version(content, FORMAT_VERSION - 1),
    "newer": lambda content: of_version(content, FORMAT_VERSION + 1),
    "much-newer": lambda content: of_version(content, 10**30),
    "another-container": lambda content: b"PCACHE\x02\x00" + content[64:],
}


@pytest.fixture(params=list(OTHER_VERSIONS))
def rewrite(request: pytest.FixtureRequest) -> Callable[[bytes], bytes]:
    return OTHER_VERSIONS[request.param]


def prompt() -> Prompt:
    documents = [Segment(text, "document") for text in DOCUMENTS[:3]]
    return Prompt([Segment(OPENING, "literal"), *documents, Segment("\n\nQuestion: Who?\nAnswer:")])


def test_the_warning_names_both_versions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key, state = make(5, 6, 7)
    store = DiskStore(tmp_path)
    for version in (FORMAT_VERSION - 1, FORMAT_VERSION + 1):
        store.put(key, state)
        (file,) = tmp_path.rglob("*.safetensors")
        file.write_bytes(of_version(file.read_bytes(), version))
        assert store.get(key) is None
        assert caplog.messages[-1].endswith(
            f"format 'pcache-state-{version}', this version reads pcache-state-{FORMAT_VERSION}"
        )


def test_an_engine_encodes_again_what_a_folder_has_of_another_version(
    rewrite: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    lm = CausalLM.from_pretrained("builtin:tiny-rag")
    folder = tmp_path / "states"
    first = PromptCacheEngine(lm, DiskStore(folder), "fast")
    expected = first.prefill(prompt()).logits
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == 4  # three documents and the opening
    for file in files:
        file.write_bytes(rewrite(file.read_bytes()))
    upgraded = PromptCacheEngine(lm, DiskStore(folder), "fast")
    read = upgraded.prefill(prompt())
    sources = [part.source for part in read.report.segments if part.kind == "document"]
    assert sources == ["encoded"] * 3
    assert torch.allclose(read.logits, expected, atol=1e-5)
    stats = upgraded.stats()
    assert (stats.damaged, stats.hits, stats.states) == (4, 0, 4)
    afterwards = PromptCacheEngine(lm, DiskStore(folder), "fast").prefill(prompt()).report
    assert {part.source for part in afterwards.segments if part.kind == "document"} == {"disk"}


def test_what_encodes_ahead_finds_the_file_and_the_first_request_replaces_it(
    rewrite: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    """`contains` looks at names alone; only a look-up finds out what a file is."""
    lm = CausalLM.from_pretrained("builtin:tiny-rag")
    PromptCacheEngine(lm, DiskStore(tmp_path), "fast").prefill(prompt())
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(rewrite(file.read_bytes()))
    engine = PromptCacheEngine(lm, DiskStore(tmp_path), "fast")
    engine.encode(DOCUMENTS[:3], progress=False)
    for _ in range(2):
        report = engine.prefill(prompt()).report
    assert report.encoded_tokens == 0
    assert all(state.record is not None for state in stored_states(tmp_path))


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    server = Server(tmp_path)
    yield server.url
    server.kill()


def test_a_server_drops_a_state_of_another_version(
    rewrite: Callable[[bytes], bytes], redis_url: str
) -> None:
    store = RedisStore(redis_url)
    store.put(*make(5, 6, 7))
    client = redis.Redis.from_url(redis_url)
    names = {name.count(b":"): name for name in client.scan_iter("pcache:*")}
    content = rewrite(client.get(names[3]))  # type: ignore[arg-type]
    writing, chunks, _ = client.get(names[1]).split(b":")  # type: ignore[union-attr]
    client.set(names[3], content)
    client.set(names[1], b"%s:%s:%d" % (writing, chunks, len(content)))
    is_replaced(store)


def test_an_object_store_drops_a_state_of_another_version(
    rewrite: Callable[[bytes], bytes],
) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    store = ObjectStore(root)
    store.put(*make(5, 6, 7))
    files = fsspec.filesystem("memory")
    (path,) = files.find(root)
    files.pipe_file(path, rewrite(files.cat_file(path)))
    is_replaced(store)


def is_replaced(store: ModuleStore) -> None:
    """What is there is dropped when it is asked for, and what is put then is kept."""
    key, state = make(5, 6, 7)
    assert store.get(key) is None
    assert (store.stats().damaged, store.stats().hits) == (1, 0)
    assert not store.contains(key)
    assert store.put(key, state)
    assert holds(store, key, state)


def test_looking_lists_states_of_another_version_and_clearing_removes_them(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    for numbers in ((1, 2, 3), (4, 5)):
        store.put(*make(*numbers))
    (path,) = tmp_path.rglob(f"{make(1, 2, 3)[0].digest}*")
    path.write_bytes(of_version(path.read_bytes(), FORMAT_VERSION + 1))
    assert sorted(state.record is None for state in stored_states(tmp_path)) == [False, True]
    assert len(clear_states(tmp_path, Selection())) == 2


# --- this version -------------------------------------------------------------------------------
# Should one of these fail, a state is no longer what it was: raise FORMAT_VERSION, and keep a file
# of the new version beside those of the old ones.


def written_state() -> KVState:
    """Two tokens in two layers, every number another."""
    stacks = stack_layers([LayerShape(1, 2, 1, 2)] * 2)
    numbers = torch.arange(16, dtype=torch.float32).reshape(2, 2, 1, 2, 2)
    return KVState(stacks, (numbers[0],), (numbers[1],), (5, 6), 3)


SPACE = KeySpace("a" * 64, "torch.float32", "default")


def test_a_file_that_this_version_wrote_when_it_was_new_is_read_bit_by_bit(tmp_path: Path) -> None:
    key = SPACE.key((1, 2, 3), (5, 6), None)
    target = tmp_path / key.digest[:2] / f"{key.digest}.safetensors"
    target.parent.mkdir()
    target.write_bytes((FORMATS / f"pcache-state-{FORMAT_VERSION}.safetensors").read_bytes())
    store = DiskStore(tmp_path)
    hit = store.get(key)
    assert hit is not None
    assert same(hit.state, written_state())


def test_the_key_of_a_state_is_what_it_was_when_the_version_was_new() -> None:
    digests = {2: "65f4ad4484eacd14aefc9f401fa0d5a4cc15509b67e30dc48657c2d8584ae53c"}
    assert SPACE.key((1, 2, 3), (5, 6), None).digest == digests[FORMAT_VERSION]


# --- versions before ----------------------------------------------------------------------------

OLD_DIGESTS = {1: "315abe4f4ee9667bf87ebdc941c25292aa86bc1686821a0fa3a518c02904c2cf"}
"""Of the same state, under the keys of that version."""


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION))
def test_a_file_that_an_old_version_wrote_is_a_miss_and_can_be_cleared(
    version: int, tmp_path: Path
) -> None:
    key, digest = SPACE.key((1, 2, 3), (5, 6), None), OLD_DIGESTS[version]
    content = (FORMATS / f"pcache-state-{version}.safetensors").read_bytes()
    path = tmp_path / digest[:2] / f"{digest}.safetensors"
    path.parent.mkdir()
    path.write_bytes(content)
    assert key.digest != digest
    store = DiskStore(tmp_path)
    assert store.get(key) is None
    assert (store.stats().damaged, path.exists()) == (0, True)  # nobody asked for that key
    assert [state.record for state in stored_states(tmp_path)] == [None]
    assert [state.path for state in clear_states(tmp_path, Selection(older_than_s=0))] == [path]
    assert not path.exists()


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION))
def test_a_file_of_an_old_version_under_a_new_name_is_dropped(version: int, tmp_path: Path) -> None:
    key = SPACE.key((1, 2, 3), (5, 6), None)
    path = tmp_path / key.digest[:2] / f"{key.digest}.safetensors"
    path.parent.mkdir()
    path.write_bytes((FORMATS / f"pcache-state-{version}.safetensors").read_bytes())
    store = DiskStore(tmp_path)
    assert store.get(key) is None
    assert (store.stats().damaged, path.exists()) == (1, False)
