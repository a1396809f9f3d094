"""A ragged batch: the new tokens of several requests laid end to end, each in its own buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pcache_core.lm.batch import Batch
from pcache_core.lm.shared import LayerRows, SharedStates


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
