"""The memory store: least recently used out first, never over budget, other tokens never served."""

from __future__ import annotations

import pytest
import torch

from pcache_core import BudgetError, MemoryStore
from pcache_core.kv.key import KeySpace, ModuleKey
from pcache_core.kv.state import KVState, LayerShape, stack_layers

SPACE = KeySpace("model", "torch.float32", "default")


def make(*token_ids: int) -> tuple[ModuleKey, KVState]:
    """A key and a state of 32 bytes a token."""
    tensor = torch.ones(1, len(token_ids), 4)
    stacks = stack_layers([LayerShape(1, 4, 1, 4)])
    state = KVState(stacks, (tensor[None],), (tensor[None],), token_ids, 0)
    return SPACE.key((), token_ids, None), state


@pytest.mark.parametrize("budget", [-1, 0, 1.5, True, "1GB", None])
def test_a_budget_that_is_no_positive_number_of_bytes_is_refused(budget: object) -> None:
    with pytest.raises(BudgetError, match="budget_bytes"):
        MemoryStore(budget_bytes=budget)  # type: ignore[arg-type]


def test_the_least_recently_used_state_goes_first() -> None:
    store = MemoryStore(budget_bytes=2 * 32)
    (a, state_a), (b, state_b), (c, state_c) = make(1), make(2), make(3)
    assert store.put(a, state_a)
    assert store.put(b, state_b)
    assert store.get(a) is not None
    assert store.put(c, state_c)
    assert [store.contains(key) for key in (a, b, c)] == [True, False, True]
    stats = store.stats()
    assert (stats.states, stats.nbytes, stats.evictions) == (2, 64, 1)


def test_a_state_larger_than_the_budget_evicts_nothing_and_is_not_kept() -> None:
    store = MemoryStore(budget_bytes=40)
    small, state = make(1)
    store.put(small, state)
    large, large_state = make(1, 2)
    assert not store.put(large, large_state)
    assert store.contains(small)
    assert not store.contains(large)


def test_replacing_a_state_counts_its_bytes_once() -> None:
    store = MemoryStore(budget_bytes=100)
    key, state = make(1)
    for _ in range(5):
        assert store.put(key, state)
    assert store.stats().nbytes == 32
    assert store.stats().evictions == 0


def test_a_state_of_other_tokens_under_the_same_digest_is_a_miss() -> None:
    store = MemoryStore()
    key, _ = make(1)
    _, other = make(2)
    store.put(key, other)
    assert store.get(key) is None
    assert store.stats().misses == 1


def test_a_deleted_state_is_gone_and_its_bytes_are_free() -> None:
    store = MemoryStore()
    key, state = make(1, 2)
    store.put(key, state)
    store.delete(key)
    store.delete(key)
    assert store.get(key) is None
    assert store.stats().nbytes == 0
