"""Tiers: found in any, brought to the first, written behind, never lost and never stale."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pcache_core import BudgetError, DiskStore, MemoryStore, OptionError, TieredStore
from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import KVState
from pcache_core.store import Hit, ModuleStore
from stored_states import make, same

ROOT = Path(__file__).parents[1]


class Slow(MemoryStore):
    """A store that writes when it is let, and can fail."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.writing = threading.Event()
        self.fails = False
        self.asked: list[int] = []

    def put(self, key: ModuleKey, state: KVState) -> bool:
        self.writing.set()
        assert self.open.wait(30)
        if self.fails:
            raise RuntimeError("broken")
        return super().put(key, state)

    def get_many(self, keys: list[ModuleKey]) -> list[Hit | None]:
        self.asked.append(len(keys))
        return [self.get(key) for key in keys]


def eventually(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_state_is_found_in_any_tier_and_brought_to_the_first(tmp_path: Path) -> None:
    key, state = make(1, 2)
    DiskStore(tmp_path).put(key, state)
    store = TieredStore([MemoryStore(), DiskStore(tmp_path)])
    assert isinstance(store, ModuleStore)
    assert store.contains(key)
    tiers = []
    for _ in range(2):
        hit = store.get(key)
        assert hit is not None
        assert same(hit.state, state)
        tiers.append(hit.tier)
    assert tiers == ["disk", "memory"]


def test_what_memory_keeps_does_not_change_with_the_file(tmp_path: Path) -> None:
    """A promoted state is a copy: the file may be damaged in place, cut or removed."""
    key, state = make(1, 2, copies=2000)
    DiskStore(tmp_path).put(key, state)
    store = TieredStore([MemoryStore(), DiskStore(tmp_path)])
    first = store.get(key)
    (path,) = tmp_path.rglob("*.safetensors")
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size // 2))
        file.truncate(path.stat().st_size // 2)
    again = store.get(key)
    assert first is not None
    assert again is not None
    assert again.tier == "memory"
    assert same(first.state, state)
    assert same(again.state, state)


def test_a_state_from_the_last_tier_reaches_the_ones_between(tmp_path: Path) -> None:
    last = MemoryStore()
    key, state = make(1, 2)
    last.put(key, state)
    middle = DiskStore(tmp_path)
    store = TieredStore([MemoryStore(), middle, last])
    assert store.get(key) is not None
    store.flush()
    assert middle.contains(key)


def test_slow_tiers_are_written_behind_and_found_meanwhile() -> None:
    slow, (key, state) = Slow(), make(1, 2)
    store = TieredStore([MemoryStore(state.nbytes), slow])
    assert store.put(key, state)
    assert slow.writing.wait(20)
    store.put(*make(3, 4))  # takes the first one's place in memory
    assert not store.tiers[0].contains(key)
    assert store.contains(key)
    hit = store.get(key)
    assert hit is not None
    assert (hit.tier, same(hit.state, state)) == ("memory", True)
    slow.open.set()
    store.flush()
    assert [slow.contains(k) for k in (key, make(3, 4)[0])] == [True, True]


def test_a_full_queue_makes_the_writer_wait_and_loses_nothing() -> None:
    slow, pairs = Slow(), [make(n, n) for n in range(8)]
    store = TieredStore([MemoryStore(), slow], queue_bytes=2 * pairs[0][1].nbytes)
    done: list[int] = []

    def put_all() -> None:
        for number, (key, state) in enumerate(pairs):
            store.put(key, state)
            done.append(number)

    thread = threading.Thread(target=put_all)
    thread.start()
    eventually(lambda: len(done) == 2)
    time.sleep(0.1)
    assert done == [0, 1]
    slow.open.set()
    thread.join(30)
    store.flush()
    assert all(slow.contains(key) for key, _ in pairs)


def test_a_state_larger_than_the_queue_is_written_all_the_same() -> None:
    last, (key, state) = MemoryStore(), make(1, 2)
    store = TieredStore([MemoryStore(), last], queue_bytes=0)
    store.put(key, state)
    store.flush()
    assert last.contains(key)


def test_a_tier_that_raises_does_not_stop_the_writing() -> None:
    slow, (one, state_one), (two, state_two) = Slow(), make(1, 1), make(2, 2)
    slow.open.set()
    slow.fails = True
    store = TieredStore([MemoryStore(), slow])
    store.put(one, state_one)
    store.flush()
    slow.fails = False
    store.put(two, state_two)
    store.flush()
    assert [slow.contains(one), slow.contains(two)] == [False, True]


@pytest.mark.parametrize("being_written", [False, True])
def test_a_deleted_state_does_not_come_back_from_the_queue(being_written: bool) -> None:
    slow, (one, state_one), (two, state_two) = Slow(), make(1, 1), make(2, 2)
    store = TieredStore([MemoryStore(), slow])
    store.put(one, state_one)
    store.put(two, state_two)
    assert slow.writing.wait(20)
    key = one if being_written else two
    threading.Timer(0.1, slow.open.set).start()
    store.delete(key)
    store.flush()
    assert store.get(key) is None
    assert not store.contains(key)


def test_several_states_are_asked_for_together_where_they_are_missing() -> None:
    pairs = [make(n, n) for n in range(5)]
    slow = Slow()
    slow.open.set()
    store = TieredStore([MemoryStore(), slow])
    for key, state in pairs[1:4]:
        slow.put(key, state)
    store.tiers[0].put(*pairs[1])
    keys = [key for key, _ in pairs]
    hits = store.get_many([*keys, keys[2]])
    assert [hit is not None for hit in hits] == [False, True, True, True, False, True]
    for hit, (_, state) in zip(hits[1:4], pairs[1:4], strict=True):
        assert hit is not None
        assert same(hit.state, state)
    assert slow.asked == [4]
    stats = store.stats()
    assert [tier.hits for tier in stats.tiers] == [1, 2]
    assert (stats.hits, stats.misses) == (3, 2)


def test_a_state_of_other_tokens_under_the_same_digest_is_a_miss_while_it_waits() -> None:
    slow, (key, state) = Slow(), make(1, 2)
    store = TieredStore([MemoryStore(1), slow])
    store.put(key, state)
    assert store.get(ModuleKey(key.digest, (1, 3))) is None
    slow.open.set()


def test_the_budget_is_that_of_the_roomiest_tier(tmp_path: Path) -> None:
    memory, disk = MemoryStore(100), DiskStore(tmp_path, budget_bytes=10**6)
    assert TieredStore([memory, disk]).stats().budget_bytes == 10**6
    unlimited = DiskStore(tmp_path, budget_bytes=None)
    assert TieredStore([memory, unlimited]).stats().budget_bytes is None
    key, state = make(1, 2)
    store = TieredStore([memory, disk])
    assert store.put(key, state)
    store.flush()
    hit = store.get(key)
    assert hit is not None
    assert hit.tier == "disk"


def test_a_closed_store_can_be_used_again(tmp_path: Path) -> None:
    store = TieredStore([MemoryStore(), DiskStore(tmp_path)])
    for tokens in range(3):
        key, state = make(tokens, 9)
        store.put(key, state)
        store.close()
        assert DiskStore(tmp_path).contains(key)


@pytest.mark.parametrize("tiers", [[], None, MemoryStore(), [MemoryStore(), "states"]])
def test_bad_tiers_are_refused(tiers: Any) -> None:
    with pytest.raises(OptionError, match="tier"):
        TieredStore(tiers)


@pytest.mark.parametrize("queue_bytes", [-1, 1.5, True])
def test_a_bad_queue_is_refused(queue_bytes: Any) -> None:
    with pytest.raises(BudgetError, match="queue_bytes"):
        TieredStore([MemoryStore()], queue_bytes=queue_bytes)


FORKING = """
import os, random, signal, sys, threading
import torch
torch.set_num_threads(1)
from pcache_core import DiskStore, MemoryStore, TieredStore
from stored_states import make
memory, disk = MemoryStore(), DiskStore(sys.argv[1])
tiered = TieredStore([MemoryStore(), DiskStore(sys.argv[1])])
stores = [memory, disk, tiered]
key, state = make(777, 1)
done = threading.Event()
def keep_busy(store, number):
    busy, its = make(800 + number, 1)
    while not done.is_set():
        store.put(busy, its)
        store.get(busy)
threads = [threading.Thread(target=keep_busy, args=(stores[n], n), daemon=True) for n in range(3)]
for thread in threads:
    thread.start()
for _ in range(40):
    child = os.fork()  # while other threads, which the child does not have, hold locks
    if not child:
        signal.alarm(20)
        for store in stores:
            store.put(key, state)
            assert store.get(key) is not None
        tiered.flush()
        assert DiskStore(sys.argv[1]).contains(key)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
done.set()
for thread in threads:
    thread.join()
for tokens in range(30):
    tiered.put(*make(tokens, 1, copies=100))
"""


def test_stores_live_on_in_a_fork_and_what_waits_is_written_before_the_interpreter_exits(
    tmp_path: Path,
) -> None:
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    subprocess.run(
        [sys.executable, "-c", FORKING, str(tmp_path)],
        check=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    store = DiskStore(tmp_path)
    assert all(store.get(make(tokens, 1, copies=100)[0]) is not None for tokens in range(30))
