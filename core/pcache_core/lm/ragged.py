"""The new tokens of several requests end to end, each in its own buffers, and a cache of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
)

from pcache_core.lm.batch import Batch
from pcache_core.lm.shared import LayerRows, SharedStates
from pcache_core.lm.structure import DummyLayer


class RaggedBatch:
    """What one forward computes: one batch, or batches of different sequences.

    input_ids, positions: [tokens], of all of them. kept: the indices of the tokens whose logits
    are wanted, ascending. starts: of each batch's first token. shared: states that batches have on
    loan.
    """

    __slots__ = ("_rows_by_keys", "input_ids", "kept", "parts", "positions", "shared", "starts")

    def __init__(self, parts: Sequence[Batch]) -> None:
        self.parts = tuple(parts)
        if len(parts) == 1:
            self.input_ids, self.positions = parts[0].input_ids, parts[0].positions
        else:
            self.input_ids = torch.cat([part.input_ids for part in parts])
            self.positions = torch.cat([part.positions for part in parts])
        self.starts = [0]
        for part in parts:
            self.starts.append(self.starts[-1] + part.num_tokens)
        kept = [
            index
            for part, end in zip(parts, self.starts[1:], strict=True)
            for index in range(end - part.num_logits, end)
        ]
        self.kept = torch.tensor(kept, device=self.input_ids.device)
        self.shared = SharedStates(parts, self.starts)
        self._rows_by_keys: dict[int, list[LayerRows]] = {}

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> LayerRows:
        """Put new rows, [1, heads, tokens, dim], into the buffers; the first buffers' rows."""
        written = []
        for part, start in zip(self.parts, self.starts, strict=False):
            own = slice(start, start + part.num_tokens)
            own_keys, own_values = part.buffers.layers[layer]
            own_keys.index_copy_(2, part.rows, keys[:, :, own])
            own_values.index_copy_(2, part.rows, values[:, :, own])
            visible = slice(part.num_rows)
            written.append((own_keys[:, :, visible], own_values[:, :, visible]))
        self._rows_by_keys[written[0][0].data_ptr()] = written
        return written[0]

    def rows(self, keys: torch.Tensor, values: torch.Tensor) -> Sequence[LayerRows] | None:
        """Each batch's rows, where these are the first buffers'; None if a model changed them."""
        if len(self.parts) == 1:
            is_whole = keys.shape[2] == self.parts[0].num_rows
            return [(keys, values)] if is_whole else None
        return self._rows_by_keys.get(keys.data_ptr())


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
