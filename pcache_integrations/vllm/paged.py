"""Keys and values in and out of a layer's paged blocks, in whatever layout vLLM keeps them.

Attention backends lay blocks out as their kernels like it: the CPU's packs keys for its matrix
instructions. Writing goes through the backend's own update operation. Reading asks that operation
where it puts each number, once, and then takes the numbers from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pcache_core.errors import ModelError

# Numbers up to this are exact in every dtype that caches have, bfloat16 included.
_DIGIT_BITS = 7


class PagedLayer:
    """One attention layer's blocks.

    layer: vLLM's attention module. block_tokens: tokens of a block.
    """

    def __init__(self, name: str, layer: Any, block_tokens: int) -> None:
        self.name = name
        self.heads = int(layer.num_kv_heads)
        self.head_dim = int(layer.head_size)
        self._layer = layer
        self._block_tokens = block_tokens
        self._places: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers in the blocks."""
        dtype: torch.dtype = self._layer.kv_cache.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        device: torch.device = self._layer.kv_cache.device
        return device

    def write(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
        """Put tokens into their rows; keys and values [heads, tokens, head_dim].

        rows: [tokens], block times tokens of a block plus the place in it.
        """
        self._update(self._layer.kv_cache, keys, values, rows)

    def read(self, block_ids: Sequence[int], tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [heads, tokens, head_dim], of a request that lies in these blocks.

        Raises: ModelError: the blocks hold something else than the numbers, such as fp8.
        """
        if self._places is None:
            self._places = self._find_places()
        index = torch.tensor(block_ids, device=self.device)
        blocks = self._layer.kv_cache.index_select(0, index).reshape(len(block_ids), -1)
        found = blocks[:, self._places]  # [blocks, 2, heads, block_tokens, head_dim]
        found = found.permute(1, 2, 0, 3, 4).reshape(2, self.heads, -1, self.head_dim)
        keys, values = found[:, :, tokens]
        return keys, values

    def _update(
        self, cache: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor
    ) -> None:
        by_token = (part.transpose(0, 1).contiguous() for part in (keys, values))
        self._layer.impl.do_kv_cache_update(self._layer, *by_token, cache, rows)

    def _find_places(self) -> torch.Tensor:
        """[2, heads, block_tokens, head_dim], where in a flat block each number lies."""
        cache = self._layer.kv_cache
        block = torch.zeros_like(cache[:1])
        shape = (2, self.heads, self._block_tokens, self.head_dim)
        count = 2 * self.heads * self._block_tokens * self.head_dim
        names = torch.arange(count, device=cache.device).reshape(shape)
        rows = torch.arange(self._block_tokens, device=cache.device)
        read = torch.zeros(block.numel(), dtype=torch.long, device=cache.device)
        for shift in range(0, count.bit_length(), _DIGIT_BITS):
            digits = (names >> shift) % (1 << _DIGIT_BITS)
            keys, values = digits.to(cache.dtype)
            self._update(block, keys, values, rows)
            read += block.reshape(-1).float().long() << shift
        order = torch.argsort(read)
        if block.numel() != count or not torch.equal(read[order], names.flatten()):
            raise ModelError(
                f"layer {self.name} keeps its blocks as {cache.dtype} in a form that can't be "
                "read back; encode documents with `pcache_core` instead"
            )
        return order.reshape(shape)


def rows_of(block_ids: Sequence[int], tokens: slice, block_tokens: int) -> torch.Tensor:
    """[tokens], the rows of a request's tokens in the paged cache."""
    index = torch.arange(tokens.start, tokens.stop)
    blocks = torch.tensor(block_ids)[index // block_tokens]
    return blocks * block_tokens + index % block_tokens
