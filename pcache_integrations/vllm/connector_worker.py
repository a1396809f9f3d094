"""The worker's side: states into paged blocks, and computed blocks into states.

Attention backends lay blocks out as their kernels like it: the CPU's packs keys for its matrix
instructions. Writing goes through the backend's own update operation. Reading asks that operation
where it puts each number, once, and then takes the numbers from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pcache_core.errors import ModelError, StateMismatchError
from pcache_core.kv.key import KeySpace, ModuleKey
from pcache_core.kv.sequence import KVBuffers
from pcache_core.kv.state import KVState
from pcache_core.lm.relocation import place
from pcache_core.store import ModuleStore, Opened, open_many
from pcache_integrations.vllm.connector_plan import Filling, Load, Save, refuse
from pcache_integrations.vllm.model_card import ModelCard

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
        self.dtype: torch.dtype = layer.kv_cache.dtype
        self.device: torch.device = layer.kv_cache.device

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


class StateWorker:
    """Fills one worker's blocks from a store, and keeps states in it.

    layers: this worker's, by their index in the model. rank: of `size` workers that share the
    heads.

    Raises: ModelError: these are not layers of the card's model.
    """

    def __init__(  # noqa: PLR0913 (each says what a worker is)
        self,
        store: ModuleStore,
        card: ModelCard,
        space: KeySpace,
        layers: Mapping[int, PagedLayer],
        block_tokens: int,
        *,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self._store = store
        self._card = card
        self._space = space
        self._layers = dict(sorted(layers.items()))
        self._block_tokens = block_tokens
        self._rank = rank
        self._size = size
        self._failed: Counter[str] = Counter()
        for index, layer in self._layers.items():
            self._check_layer(index, layer)

    def load(self, load: Load) -> set[int]:
        """Fill a request's blocks; return those from the first on that could not be filled.

        All states are read and moved before any block is written. A state that is gone, damaged
        or not what it should be ends the part that is filled.
        """
        buffers = KVBuffers(
            self._card.stacks,
            load.stop - load.start,
            dtype=self._card.torch_dtype,
            device=next(iter(self._layers.values())).device,
        )
        reached = self._fill(buffers, load)
        whole = reached - reached % self._block_tokens if reached < load.stop else reached
        if whole > load.start:
            self._write(buffers, load, whole)
        return set(load.block_ids[whole // self._block_tokens :]) if whole < load.stop else set()

    def save(self, save: Save) -> None:
        """Keep what was computed."""
        ids = save.token_ids[save.start :]
        key = ModuleKey(save.key, ids, self._space, save.token_ids[: save.start])
        tokens = slice(save.start, len(save.token_ids))
        try:
            read = {i: one.read(save.block_ids, tokens) for i, one in self._layers.items()}
        except ModelError as error:
            refuse(self._failed, "a state could not be kept", str(error))
            return
        parts = [
            tuple(torch.stack([read[i][part] for i in stack.layers]) for stack in self._card.stacks)
            for part in (0, 1)
        ]
        state = KVState(self._card.stacks, parts[0], parts[1], ids, save.start)
        if not self._store.put(key, state):
            refuse(self._failed, "a state could not be kept", "the store did not take it")

    def _heads(self, total: int) -> slice:
        """This worker's of a layer's heads; several workers share one where there are too few."""
        first = self._rank * total // self._size
        return slice(first, first + max(1, total // self._size))

    def _check_layer(self, index: int, layer: PagedLayer) -> None:
        card = self._card
        shape = card.layers[index] if index < len(card.layers) else None
        if shape is None or (
            len(range(shape.key_heads)[self._heads(shape.key_heads)]) != layer.heads
            or shape.key_dim != layer.head_dim
        ):
            raise ModelError(
                f"layer {layer.name} has {layer.heads} heads of {layer.head_dim}, {card.name} has "
                f"{shape} in all; start the server with the command that `pcache serve` prints for "
                "this model"
            )
        if layer.dtype != card.torch_dtype:
            raise ModelError(
                f"layer {layer.name} caches {layer.dtype}, states are {card.dtype}; start the "
                f"server with --dtype {card.dtype} and --kv-cache-dtype auto"
            )

    def _fill(self, buffers: KVBuffers, load: Load) -> int:
        """Move the states into the buffers, one after the other; return how far that went."""
        keys = [ModuleKey(f.key, f.token_ids, self._space) for f in load.fillings]
        unique = list(dict.fromkeys(keys))
        opened = dict(zip(unique, open_many(self._store, unique), strict=True))
        states: dict[ModuleKey, KVState] = {}
        for key, filling in zip(keys, load.fillings, strict=True):
            try:
                if key not in states:
                    states[key] = self._read(opened[key])
                self._place(buffers, load, filling, states[key])
            except StateMismatchError as error:
                refuse(self._failed, "a state could not be loaded", str(error))
                return filling.start
        return load.stop

    def _read(self, opened: Opened | None) -> KVState:
        """Raises: StateMismatchError: it is not there, or damaged, or another model's."""
        if opened is None:
            raise StateMismatchError("it is no longer in the store, or was not right")
        try:
            opened.rows.check(self._card.stacks, self._card.torch_dtype)
            state = opened.rows.whole()
        except StateMismatchError as error:
            opened.settle(0.0, error)
            raise
        opened.settle(0.0, None)
        return state

    def _place(self, buffers: KVBuffers, load: Load, filling: Filling, state: KVState) -> None:
        count = filling.stop - filling.start
        part = state.part(filling.first, filling.first + count, state.position + filling.first)
        row = filling.start - load.start
        place(buffers, row, part, self._card.rotations, position=filling.start)

    def _write(self, buffers: KVBuffers, load: Load, stop: int) -> None:
        tokens = slice(load.start, stop)
        count = stop - load.start
        rows = _rows_of(load.block_ids, tokens, self._block_tokens).to(buffers.positions.device)
        for index, layer in self._layers.items():
            keys, values = (part[0] for part in buffers.layers[index])
            heads = self._heads(len(keys))
            layer.write(keys[heads, :count], values[heads, :count], rows)


def _rows_of(block_ids: Sequence[int], tokens: slice, block_tokens: int) -> torch.Tensor:
    """[tokens], the rows of a request's tokens in the paged cache."""
    index = torch.arange(tokens.start, tokens.stop)
    blocks = torch.tensor(block_ids)[index // block_tokens]
    return blocks * block_tokens + index % block_tokens
