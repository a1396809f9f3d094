"""Keys and random states for tests of stores, and a user who may not do everything."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from pcache_core.kv.key import KeySpace, ModuleKey
from pcache_core.kv.state import KVState, LayerShape, stack_layers
from pcache_core.store import ModuleStore

SPACE = KeySpace(
    "a" * 64,
    "torch.float32",
    "default",
    model_name="random",
    decode=lambda ids: " ".join(f"w{i}" for i in ids),
)
STACKS = stack_layers([LayerShape(2, 8, 2, 8)] * 3 + [LayerShape(1, 4, 1, 6)])


def make(
    *token_ids: int,
    space: KeySpace = SPACE,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    copies: int = 1,
) -> tuple[ModuleKey, KVState]:
    """A key and a state of two stacks; the tokens decide its numbers. copies: of the tokens."""
    ids = tuple(token_ids) * copies
    generator = torch.Generator().manual_seed(hash((ids[:64], seed)) % 2**31)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    keys = [(len(s.layers), s.shape.key_heads, len(ids), s.shape.key_dim) for s in STACKS]
    values = [(len(s.layers), s.shape.value_heads, len(ids), s.shape.value_dim) for s in STACKS]
    state = KVState(
        STACKS,
        tuple(numbers(*shape) for shape in keys),
        tuple(numbers(*shape) for shape in values),
        ids,
        3,
    )
    return space.key((1, 2, 3), ids, None), state


def same(one: KVState, other: KVState) -> bool:
    """Whether two states are the same bit by bit."""
    return (
        (one.stacks, one.token_ids, one.position) == (other.stacks, other.token_ids, other.position)
        and all(map(torch.equal, one.keys, other.keys))
        and all(map(torch.equal, one.values, other.values))
        and [t.dtype for t in one.keys] == [t.dtype for t in other.keys]
    )


def holds(store: ModuleStore, key: ModuleKey, state: KVState) -> bool:
    """Whether a store gives just this state for a key."""
    hit = store.get(key)
    return hit is not None and same(hit.state, state)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without the superuser's right to read and write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
