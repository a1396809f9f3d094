"""The cache object a model writes new keys and values into: rows of buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
)

from pcache_core.lm.ragged import RaggedBatch
from pcache_core.lm.structure import DummyLayer


class _SlotLayer(CacheLayerMixin):
    """Writes one layer's new rows into the buffers and returns a view of the rows that take part.

    Of several it returns the first one's, which is all that fits; the attention finds the
    others by it.
    """

    is_sliding = False  # full length everywhere: the attention masks by position

    def __init__(self, batches: RaggedBatch, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True
        self._batches = batches
        self._index = index
        first = batches.parts[0]
        self._length = first.num_rows - first.num_tokens
        self._num_rows = first.num_rows

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the buffers are there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [1, heads, tokens, dim] at the batches' rows."""
        self._length = self._num_rows
        return self._batches.write(self._index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._num_rows, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1


def slot_cache(batches: RaggedBatch, caching_layers: Sequence[bool]) -> Cache:
    """A cache over the batches' buffers; layers that share another layer's states hold nothing."""
    layers: list[CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer] = []
    index = 0
    for caches in caching_layers:
        layers.append(_SlotLayer(batches, index) if caches else DummyLayer())
        index += caches
    return Cache(layers=layers)
