"""The worker's side: states into paged blocks, and computed blocks into states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pcache_core.errors import ModelError, StateMismatchError
from pcache_core.kv.buffers import KVBuffers
from pcache_core.kv.key import KeySpace, ModuleKey
from pcache_core.kv.state import KVState
from pcache_core.lm.relocation import place
from pcache_core.store import ModuleStore, Opened, open_many
from pcache_integrations.vllm.model_card import ModelCard
from pcache_integrations.vllm.paged import PagedLayer, rows_of
from pcache_integrations.vllm.planner import Filling, Load, Save
from pcache_integrations.vllm.tally import Tally


@dataclass(frozen=True, slots=True)
class Share:
    """This worker's part of a model. layers: index in the model to blocks; rank: of `size`."""

    layers: dict[int, PagedLayer]
    rank: int = 0
    size: int = 1

    def heads(self, total: int) -> slice:
        """This worker's of a layer's heads; several workers share one where there are too few."""
        first = self.rank * total // self.size
        return slice(first, first + max(1, total // self.size))

    def check(self, card: ModelCard) -> None:
        """Raises: ModelError: these are not the layers of the card's model."""
        for index, layer in self.layers.items():
            shape = card.layers[index] if index < len(card.layers) else None
            if shape is None or (
                len(range(shape.key_heads)[self.heads(shape.key_heads)]) != layer.heads
                or shape.key_dim != layer.head_dim
            ):
                raise ModelError(
                    f"layer {layer.name} has {layer.heads} heads of {layer.head_dim}, "
                    f"{card.name} has {shape} in all; start the server with the command that "
                    "`pcache serve` prints for this model"
                )
            if layer.dtype != card.torch_dtype:
                raise ModelError(
                    f"layer {layer.name} caches {layer.dtype}, states are {card.dtype}; start the "
                    f"server with --dtype {card.dtype} and --kv-cache-dtype auto"
                )


class StateWorker:
    """Fills one worker's blocks from a store, and keeps states in it."""

    def __init__(
        self,
        store: ModuleStore,
        card: ModelCard,
        space: KeySpace,
        share: Share,
        block_tokens: int,
    ) -> None:
        self._store = store
        self._card = card
        self._space = space
        self._share = share
        self._block_tokens = block_tokens
        self._tally = Tally()

    def load(self, load: Load) -> set[int]:
        """Fill a request's blocks; returns those from the first on that could not be filled.

        All states are read and moved before any block is written. A state that is gone, damaged
        or not what it should be ends the part that is filled.
        """
        buffers = KVBuffers(
            self._card.stacks,
            load.stop - load.start,
            dtype=self._card.torch_dtype,
            device=next(iter(self._share.layers.values())).device,
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
            read = [self._share.layers[i].read(save.block_ids, tokens) for i in self._own()]
        except ModelError as error:
            self._tally.add("a state could not be kept", str(error))
            return
        parts = [
            tuple(torch.stack([read[i][part] for i in stack.layers]) for stack in self._card.stacks)
            for part in (0, 1)
        ]
        state = KVState(self._card.stacks, parts[0], parts[1], ids, save.start)
        if not self._store.put(key, state):
            self._tally.add("a state could not be kept", "the store did not take it")

    def _own(self) -> Sequence[int]:
        return sorted(self._share.layers)

    def _fill(self, buffers: KVBuffers, load: Load) -> int:
        """Move the states into the buffers, one after the other; returns how far that went."""
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
                self._tally.add("a state could not be loaded", str(error))
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
        rows = rows_of(load.block_ids, tokens, self._block_tokens).to(buffers.positions.device)
        for index, layer in self._share.layers.items():
            keys, values = (part[0] for part in buffers.layers[index])
            heads = self._share.heads(len(keys))
            layer.write(keys[heads, :count], values[heads, :count], rows)
