"""What goes wrong with a store, seen from the engine: every request is answered right."""

from __future__ import annotations

import logging
import random
import resource
import shutil
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
import torch

from pcache_core import (
    CausalLM,
    DiskStore,
    MemoryStore,
    ModuleStore,
    Prompt,
    PromptCacheEngine,
    Segment,
    TieredStore,
)
from pcache_core.store.redis import RedisStore
from redis_server import Server
from stored_states import as_nobody, make

OPENING = Segment("Answer from the notes.\n", "literal")
TEXTS = [f"Note {n}: the river runs past mill number {n}, and on to the sea." for n in range(4)]
PROMPT = Prompt(
    [OPENING, *(Segment(text, "document") for text in TEXTS), Segment("\nWhere is the mill?")]
)


@pytest.fixture(scope="module")
def lm(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm()


@pytest.fixture(scope="module")
def right(lm: CausalLM) -> torch.Tensor:
    """The logits without any store that lasts."""
    return PromptCacheEngine(lm, MemoryStore(), "fast").prefill(PROMPT).logits


class Asked:
    """Asks the same with a new engine each time, and compares."""

    def __init__(self, lm: CausalLM, right: torch.Tensor) -> None:
        self._lm = lm
        self._right = right
        self.requests = 0

    def __call__(self, store: ModuleStore) -> list[str]:
        """Where the documents came from."""
        engine = PromptCacheEngine(self._lm, store, "fast")
        prefill = engine.prefill(PROMPT)
        torch.testing.assert_close(prefill.logits, self._right, rtol=0, atol=1e-4)
        self.requests += 1
        return [s.source for s in prefill.report.segments if s.kind == "document"]


@pytest.fixture
def ask(lm: CausalLM, right: torch.Tensor) -> Asked:
    return Asked(lm, right)


def files(folder: Path, pattern: str = "*.safetensors") -> list[Path]:
    return sorted(folder.rglob(pattern))


def of_document(folder: Path, lm: CausalLM, number: int = 0) -> Path:
    """The file of a document."""
    alone = Path(tempfile.mkdtemp(dir=folder.parent))
    PromptCacheEngine(lm, DiskStore(alone)).encode([TEXTS[number]], progress=False)
    names = {path.name for path in files(alone)}
    (path,) = (path for path in files(folder) if path.name in names)
    shutil.rmtree(alone)
    return path


@pytest.mark.parametrize("tiers", ["disk", "memory before disk"])
def test_a_file_damaged_anywhere_is_dropped_and_encoded_again(
    ask: Asked, lm: CausalLM, tmp_path: Path, tiers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "store"
    ask(DiskStore(folder))
    path = of_document(folder, lm)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    chance = random.Random(0)
    regions = {
        "length": (0, 8),
        "header": (8, header),
        "keys": (header, (header + len(whole)) // 2),
    }
    regions |= {"values": ((header + len(whole)) // 2, len(whole) - 16)}
    regions |= {"seal": (len(whole) - 16, len(whole))}
    cases: dict[str, bytes] = {}
    for name, (start, stop) in regions.items():
        for at in [start, stop - 1, *(chance.randrange(start, stop) for _ in range(4))]:
            flipped = bytes([whole[at] ^ (1 << chance.randrange(8))])
            cases[f"{name} at {at}"] = whole[:at] + flipped + whole[at + 1 :]
    cuts = (0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1)
    cases |= {f"cut to {length}": whole[:length] for length in cuts}
    cases |= {
        "zeros": bytes(len(whole)),
        "longer": whole + b"\0",
        "terabytes": struct.pack("<Q", 2**42) + whole[8:],
    }
    cases |= {
        "header of terabytes": whole.replace(b'"shape":[', b'"shape":[99999999999,', 1),
        "another version": whole.replace(b"pcache-state-", b"pcache-state-9", 1),
        "another document": of_document(folder, lm, 1).read_bytes(),
    }
    for case, content in cases.items():
        path.write_bytes(content)
        disk = DiskStore(folder)
        store = disk if tiers == "disk" else TieredStore([MemoryStore(), disk])
        assert ask(store) == ["encoded", "disk", "disk", "disk"], case
        if isinstance(store, TieredStore):
            store.flush()
        assert disk.stats().damaged == 1, case
        assert ask(DiskStore(folder)) == ["disk"] * 4, case
    assert files(folder, "*.tmp") == []
    with capsys.disabled():
        print(
            f"\n{len(cases)} kinds of damage behind {tiers}: {ask.requests} right answers", end=""
        )


def test_another_models_states_in_the_same_folder_disturb_nobody(
    ask: Asked, tiny_lm: Callable[..., CausalLM], tmp_path: Path, lm: CausalLM
) -> None:
    other = PromptCacheEngine(tiny_lm("llama", seed=8), DiskStore(tmp_path), "fast")
    other.prefill(PROMPT)
    foreign = files(tmp_path)
    assert ask(DiskStore(tmp_path)) == ["encoded"] * 4
    own = [path for path in files(tmp_path) if path not in foreign]
    for mine, theirs in zip(own, foreign, strict=True):
        shutil.copy(theirs, mine)  # under the right name
    store = DiskStore(tmp_path)
    assert ask(store) == ["encoded"] * 4
    assert store.stats().damaged == len(own)
    assert ask(DiskStore(tmp_path)) == ["disk"] * 4


def test_on_a_full_disk_requests_are_answered_and_said_once(
    ask: Asked, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = DiskStore(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may be longer: writes fail half way, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        assert [ask(store) for _ in range(3)] == [["encoded"] * 4] * 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path, "*.*") == []
    assert store.stats().failures >= 12
    assert sum(r.levelno == logging.WARNING for r in caplog.records) == 1
    assert ask(store) == ["encoded"] * 4
    assert ask(store) == ["disk"] * 4


def test_a_read_only_folder_serves_what_it_has_and_is_used_again(
    ask: Asked, lm: CausalLM, nobodys_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with as_nobody():
        PromptCacheEngine(lm, DiskStore(nobodys_folder)).encode(TEXTS[:2], progress=False)
        folders = [*(path.parent for path in files(nobodys_folder)), nobodys_folder]
        for folder in folders:
            folder.chmod(0o500)
        store = DiskStore(nobodys_folder)
        for _ in range(3):
            assert ask(store) == ["disk", "disk", "encoded", "encoded"]
        store.delete(make(1, 2)[0])
        (warning,) = (r for r in caplog.records if r.levelno >= logging.WARNING)
        assert "writing states" in warning.getMessage()
        for folder in reversed(folders):
            folder.chmod(0o700)
        assert ask(store) == ["disk", "disk", "encoded", "encoded"]
        assert ask(store) == ["disk"] * 4


@pytest.mark.parametrize("tiers", ["disk", "memory before disk"])
def test_a_folder_removed_in_use_is_filled_anew(ask: Asked, tmp_path: Path, tiers: str) -> None:
    folder = tmp_path / "store"
    disk = DiskStore(folder)
    store = disk if tiers == "disk" else TieredStore([MemoryStore(1), disk])
    for _ in range(3):
        assert ask(store) == ["encoded"] * 4
        if isinstance(store, TieredStore):
            store.flush()
        assert ask(store) == ["disk"] * 4
        shutil.rmtree(folder)
        assert disk.stats().states == 0


def test_a_server_killed_and_restarted_under_requests_costs_no_answer(
    ask: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(tmp_path)
    stop, kills = threading.Event(), 0

    def kill() -> None:
        nonlocal kills
        while not stop.wait(0.2):
            server.kill()
            kills += 1
            stop.wait(0.1)
            server.start()
            stop.wait(1.2)  # long enough for the store to try again

    thread = threading.Thread(target=kill)
    store = RedisStore(server.url)
    sources: list[str] = []
    thread.start()
    try:
        until = time.monotonic() + 7
        while time.monotonic() < until:
            sources += ask(store)
    finally:
        stop.set()
        thread.join()
        server.kill()
    with capsys.disabled():
        print(
            f"\n{kills} kills, {ask.requests} right answers, {sources.count('remote')} states "
            f"served, {sources.count('encoded')} encoded",
            end="",
        )
    assert kills >= 3
    assert sources.count("remote") > 0
    assert sources.count("encoded") > 4
    assert store.stats().failures > 0
    assert store.stats().damaged == 0


def test_a_manifest_that_claims_a_terabyte_is_asked_for_no_more_than_a_batch(
    ask: Asked, tmp_path: Path
) -> None:
    server = Server(tmp_path)
    try:
        ask(RedisStore(server.url))
        with redis.Redis(port=server.port) as client:
            for name in client.keys("pcache:" + "?" * 64):
                client.set(name, f"{'0' * 16}:{10**6}:{10**6 * 2**20}")
            client.config_resetstat()
            assert ask(RedisStore(server.url)) == ["encoded"] * 4
            assert client.info("commandstats")["cmdstat_get"]["calls"] < 100
            assert ask(RedisStore(server.url)) == ["remote"] * 4
    finally:
        server.kill()
