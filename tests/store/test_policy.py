"""Eviction: what is worth most for its bytes stays, and nothing stays for ever."""

from __future__ import annotations

import random

import pytest

from pcache_core import MemoryStore
from pcache_core.store import CostAware, EvictionPolicy, LeastRecentlyUsed
from stored_states import make


@pytest.mark.parametrize("policy", [LeastRecentlyUsed(), CostAware()])
def test_an_empty_store_has_no_victim(policy: EvictionPolicy) -> None:
    with pytest.raises(LookupError):
        policy.victim()
    policy.used("a", num_tokens=1, nbytes=1)
    policy.removed("a")
    policy.removed("a")
    with pytest.raises(LookupError):
        policy.victim()


def test_the_state_that_saves_least_work_for_its_bytes_goes_first() -> None:
    policy = CostAware()
    policy.used("large model", num_tokens=100, nbytes=4_000)
    policy.used("small model", num_tokens=100, nbytes=400)
    policy.used("long, small model", num_tokens=1000, nbytes=4_100)
    assert policy.victim() == "large model"


def test_among_equals_the_one_used_least_and_longest_ago_goes_first() -> None:
    policy = CostAware()
    for digest in "abc":
        policy.used(digest, num_tokens=10, nbytes=100)
    policy.used("a", num_tokens=10, nbytes=100)
    assert policy.victim() == "b"
    policy.removed("b")
    assert policy.victim() == "c"


def test_a_former_favourite_goes_in_the_end() -> None:
    policy = CostAware()
    for _ in range(50):
        policy.used("favourite", num_tokens=10, nbytes=100)
    for number in range(200):
        policy.used(str(number), num_tokens=10, nbytes=100)
        policy.used(str(number), num_tokens=10, nbytes=100)
        victim = policy.victim()
        if number > 0:
            policy.removed(victim)
        if victim == "favourite":
            break
    assert victim == "favourite"
    assert number > 10


def test_the_heap_agrees_with_a_plain_search() -> None:
    """The oracle is the definition: uses × tokens ÷ bytes over the floor at the last use."""
    policy, chance = CostAware(), random.Random(1)
    worth: dict[str, tuple[float, int, int]] = {}
    floor, sizes = 0.0, {str(n): (chance.randint(1, 99), chance.randint(1, 999)) for n in range(60)}
    for step in range(5_000):
        digest = chance.choice(list(sizes))
        tokens, nbytes = sizes[digest]
        policy.used(digest, num_tokens=tokens, nbytes=nbytes)
        uses = worth.get(digest, (0, 0, 0))[2] + 1
        worth[digest] = (floor + uses * tokens / nbytes, step, uses)
        if len(worth) > 30:
            expected = min(worth, key=lambda name: worth[name][:2])
            assert policy.victim() == expected
            floor = worth.pop(expected)[0]
            policy.removed(expected)


def test_a_memory_store_evicts_by_its_policy() -> None:
    pairs = [make(n, n) for n in range(3)]
    store = MemoryStore(2 * pairs[0][1].nbytes, CostAware())
    for key, state in pairs[:2]:
        store.put(key, state)
    store.get(pairs[0][0])
    store.get(pairs[0][0])
    store.get(pairs[1][0])
    store.put(*pairs[2])
    assert [store.contains(key) for key, _ in pairs] == [True, False, True]
    assert store.stats().nbytes == 2 * pairs[0][1].nbytes
