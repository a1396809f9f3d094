"""How time to first token grows: with the cached tokens, and with the size of the store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import correlation, linear_regression

import torch

from pcache_core import CausalLM, ModuleStore
from pcache_core.kv.key import KeySpace
from pcache_core.kv.state import KVState
from pcache_integrations.bench.figures import Line, Row

_FEWEST_SIZES = 3


def fit_line(way: str, points: Sequence[tuple[float, float]]) -> Line:
    """Least squares through (cached tokens, TTFT in ms)."""
    tokens, ttft_ms = zip(*points, strict=True)
    slope, intercept = linear_regression(tokens, ttft_ms)
    r = correlation(tokens, ttft_ms) if len(set(ttft_ms)) > 1 else 1.0
    return Line(way, slope * 1000, intercept, r * r)


def fit_rows(rows: Iterable[Row], ways: Sequence[str]) -> tuple[Line, ...]:
    """A line for each of these ways that was timed at three sizes or more."""
    points: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for row in rows:
        if row.way in points and row.order in ("new", "floor"):
            points[row.way].append((row.cached_tokens, row.ttft_ms.p50))
    return tuple(fit_line(way, each) for way, each in points.items() if len(each) >= _FEWEST_SIZES)


def fill(store: ModuleStore, lm: CausalLM, count: int, namespace: str) -> None:
    """Put `count` states of one token each into a store, as if that many documents were known."""
    keys = KeySpace(lm.fingerprint, str(lm.dtype), namespace)
    shapes = [(len(stack.layers), stack.shape) for stack in lm.stacks]
    for number in range(count):
        state = KVState(
            lm.stacks,
            tuple(_zeros(lm, layers, s.key_heads, s.key_dim) for layers, s in shapes),
            tuple(_zeros(lm, layers, s.value_heads, s.value_dim) for layers, s in shapes),
            token_ids=(0,),
            position=1,
        )
        # A preamble of one token that is not the engine's, so that no prompt asks for it.
        store.put(keys.key((number,), state.token_ids, None), state)


def _zeros(lm: CausalLM, layers: int, heads: int, dim: int) -> torch.Tensor:
    return torch.zeros(layers, heads, 1, dim, dtype=lm.dtype, device=lm.device)
