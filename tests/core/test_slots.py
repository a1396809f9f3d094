"""Kept slots: what may be continued, and what never is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pcache_core.slots import COMPUTED, Lease, SlotPool

from pcache_core.kv import LayerShape, Slot, stack_layers

LAYERS = (LayerShape(1, 2, 1, 2),)


def make_pool(max_idle: int = 2) -> SlotPool:
    def make(capacity: int) -> Slot:
        return Slot(stack_layers(LAYERS), capacity, dtype=torch.float32, device=torch.device("cpu"))

    return SlotPool(make, max_idle)


def use(pool: SlotPool, ids: Sequence[int], labels: Sequence[str] | None = None) -> Lease:
    """A request that fills every row with its token id and gives the slot back."""
    lease = pool.acquire(ids, lambda row, label: False, len(ids))
    lease.token_ids, lease.labels = list(ids), list(labels or [COMPUTED] * len(ids))
    lease.positions = list(range(len(ids)))
    for row, token_id in enumerate(ids):
        lease.slot.keys[0][:, :, row] = token_id
    pool.release(lease)
    return lease


def any_row(row: int, label: str) -> bool:
    return True


def only_computed(row: int, label: str) -> bool:
    return label == COMPUTED


def test_a_prompt_that_starts_alike_continues_the_slot_but_its_last_token() -> None:
    pool = make_pool()
    use(pool, [1, 2, 3, 4])
    lease = pool.acquire([1, 2, 3, 4], any_row, 4)
    assert lease.token_ids == [1, 2, 3]
    assert lease.slot.keys[0][0, 0, :3, 0].tolist() == [1, 2, 3]


def test_a_short_common_start_is_copied_and_the_longer_slot_survives() -> None:
    pool = make_pool()
    original = use(pool, [1, 2, 3, 4, 5, 6])
    lease = pool.acquire([1, 2, 9, 9], any_row, 4)
    assert lease.token_ids == [1, 2]
    assert lease.slot is not original.slot
    assert lease.slot.keys[0][0, 0, :2, 0].tolist() == [1, 2]
    assert pool.acquire([1, 2, 3, 4, 5, 6, 7], any_row, 7).token_ids == [1, 2, 3, 4, 5, 6]


def test_a_slot_that_is_too_small_is_copied_into_a_larger_one() -> None:
    pool = make_pool()
    use(pool, [1, 2, 3])
    lease = pool.acquire([1, 2, 3, *range(2000)], any_row, 2003)
    assert lease.token_ids == [1, 2, 3]
    assert lease.slot.capacity >= 2003
    assert lease.slot.keys[0][0, 0, :3, 0].tolist() == [1, 2, 3]


def test_a_row_from_a_state_that_is_not_wanted_ends_the_prefix() -> None:
    pool = make_pool()
    use(pool, [1, 2, 3, 4], [COMPUTED, "state", "state", COMPUTED])
    assert pool.acquire([1, 2, 3, 4, 5], only_computed, 5).token_ids == [1]
    use(pool, [1, 2, 3, 4], [COMPUTED, "state", "state", COMPUTED])
    lease = pool.acquire([1, 2, 3, 4, 5], lambda row, label: label in (COMPUTED, "state"), 5)
    assert lease.token_ids == [1, 2, 3, 4]


def test_a_slot_in_use_is_never_given_to_another_request() -> None:
    pool = make_pool()
    use(pool, [1, 2, 3])
    first = pool.acquire([1, 2, 3, 4], any_row, 4)
    second = pool.acquire([1, 2, 3, 4], any_row, 4)
    assert first.slot is not second.slot
    assert second.token_ids == []


def test_a_full_pool_forgets_the_oldest_and_reuses_its_buffer() -> None:
    pool = make_pool(max_idle=2)
    oldest = use(pool, [1, 1, 1])
    use(pool, [2, 2, 2])
    lease = pool.acquire([3, 3, 3], any_row, 3)
    assert lease.slot is oldest.slot
    assert lease.token_ids == []
