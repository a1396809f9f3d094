"""The cache object a model writes new keys and values into: rows of a slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    LinearAttentionCacheLayerMixin,
)

from pcache_core.lm.batch import Batch


class _SlotLayer(CacheLayerMixin):
    """Writes one layer's new rows into the slot and returns a view of the rows that take part."""

    is_sliding = False  # full length everywhere: the attention masks by position

    def __init__(self, batch: Batch, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True
        self._slot_keys, self._slot_values = batch.slot.layers[index]
        self._rows = batch.rows
        self._length = batch.num_rows - len(batch.rows)
        self._num_rows = batch.num_rows

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the slot is there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [1, heads, tokens, dim] at the batch's rows."""
        self._slot_keys.index_copy_(2, self._rows, key_states)
        self._slot_values.index_copy_(2, self._rows, value_states)
        self._length = self._num_rows
        visible = slice(self._num_rows)
        return self._slot_keys[:, :, visible], self._slot_values[:, :, visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._num_rows, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1


def slot_cache(batch: Batch, caching_layers: Sequence[bool]) -> Cache:
    """A cache over the batch's slot; layers that share another layer's states hold nothing."""
    layers: list[CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer] = []
    index = 0
    for caches in caching_layers:
        layers.append(_SlotLayer(batch, index) if caches else DummyLayer())
        index += caches
    return Cache(layers=layers)
