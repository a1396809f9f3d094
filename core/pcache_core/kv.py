"""Attention states: what a module leaves behind, and the buffers a request attends over."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import torch

from pcache_core.errors import StateMismatchError


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Heads and dimensions of what one layer caches per token.

    Keys and values may differ: multi-head latent attention keeps the latent vector in `keys` and
    the rotary part in `values`.
    """

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    @property
    def elements_per_token(self) -> int:
        """Numbers cached for one token."""
        return self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers of one shape, kept in one tensor.

    layers: which of the caching layers, ascending. Most models need a single stack.
    """

    shape: LayerShape
    layers: tuple[int, ...]


def stack_layers(shapes: Sequence[LayerShape]) -> tuple[Stack, ...]:
    """Group caching layers by shape."""
    groups: dict[LayerShape, list[int]] = {}
    for index, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(index)
    return tuple(Stack(shape, tuple(layers)) for shape, layers in groups.items())


Part = Literal["keys", "values"]

# Numbers that are worked on at a time, so that what one step brought to the cache is there for the
# next; not fewer, because each step of a block costs some microseconds whatever its size.
_BLOCK_NUMBERS = 2**20
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Neighbouring layers of one stack's keys or values.

    layers: which of the stack's, by index. rows: [layers, heads, tokens, head_dim].
    scale: [layers, heads, 1, head_dim] fp32, what int8 `rows` are multiples of; None for others.
    """

    stack: int
    part: Part
    layers: slice
    rows: torch.Tensor
    scale: torch.Tensor | None = None


class Rows(Protocol):
    """A state that can be copied into a slot: in memory, or where a store keeps it."""

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """How its tensors hold the caching layers."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the module, without its preamble."""

    @property
    def position(self) -> int:
        """Of the first token when it was encoded."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the module."""

    def check(self, stacks: tuple[Stack, ...], dtype: torch.dtype) -> None:
        """Raises: StateMismatchError: shapes or dtype are not this model's."""

    def blocks(self) -> Iterator[Block]:
        """All of it once. Raises: StateMismatchError: at the end, if what was read is damaged."""

    def whole(self) -> KVState:
        """All of it in the model's dtype. Raises: StateMismatchError: it is damaged."""


def layer_blocks(tensor: torch.Tensor) -> Iterator[slice]:
    """Layers of a stacked tensor that are worked on together: all of them but on a CPU."""
    layers = len(tensor)
    count = layers
    if tensor.device.type == "cpu" and tensor.numel():
        count = max(1, _BLOCK_NUMBERS * layers // tensor.numel())
    for start in range(0, layers, count):
        yield slice(start, min(start + count, layers))


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class KVState:
    """Keys and values of a module's tokens, every layer; treated as immutable.

    keys, values: one tensor for each of `stacks`, [layers, heads, tokens, head_dim].
    token_ids: the module's tokens, without its preamble.
    position: of the first token when it was encoded. The others followed without a gap, unless
        the state is of a passage with gaps, which is then in its key.
    """

    stacks: tuple[Stack, ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    token_ids: tuple[int, ...]
    position: int

    @property
    def num_tokens(self) -> int:
        """Tokens in the module."""
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        """Bytes held by the tensors."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each caching layer, [heads, tokens, head_dim], in layer order."""
        return _by_layer(self.stacks, self.keys, self.values)

    def part(self, start: int, stop: int, position: int) -> KVState:
        """A view of tokens `start … stop` as a state, the first encoded at `position`."""
        return KVState(
            stacks=self.stacks,
            keys=tuple(keys[:, :, start:stop] for keys in self.keys),
            values=tuple(values[:, :, start:stop] for values in self.values),
            token_ids=self.token_ids[start:stop],
            position=position,
        )

    def blocks(self) -> Iterator[Block]:
        """Its tensors, a few layers at a time."""
        parts: tuple[tuple[Part, Sequence[torch.Tensor]], ...]
        parts = (("keys", self.keys), ("values", self.values))
        for index in range(len(self.stacks)):
            for part, tensors in parts:
                for layers in layer_blocks(tensors[index]):
                    yield Block(index, part, layers, tensors[index][layers])

    def whole(self) -> KVState:
        """Itself."""
        return self

    def check(self, stacks: tuple[Stack, ...], dtype: torch.dtype) -> None:
        """Raises: StateMismatchError: shapes or dtype are not this model's, or tensors disagree."""
        if self.stacks != stacks or not len(self.keys) == len(self.values) == len(stacks):
            raise StateMismatchError("the state's layers are not those of this model")
        for stack, keys, values in zip(stacks, self.keys, self.values, strict=True):
            shape, layers = stack.shape, len(stack.layers)
            for name, tensor, heads, dim in (
                ("keys", keys, shape.key_heads, shape.key_dim),
                ("values", values, shape.value_heads, shape.value_dim),
            ):
                expected = (layers, heads, self.num_tokens, dim)
                if tuple(tensor.shape) != expected or tensor.dtype != dtype:
                    raise StateMismatchError(
                        f"{name} are {tuple(tensor.shape)} {tensor.dtype}, this model and module "
                        f"need {expected} {dtype}"
                    )


@dataclass(frozen=True, eq=False)
class Loan:
    """A state that serves rows of a prompt from where it lies, for several requests at once.

    start: the prompt's row of its first token, which stands at `position`.
    replaced: rows that the slot holds itself instead, because they were computed again; ascending.
    """

    state: KVState
    start: int
    position: int
    replaced: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        """One behind the last row."""
        return self.start + self.state.num_tokens

    def head(self, stop: int) -> Loan:
        """What of it lies before row `stop`."""
        if stop >= self.stop:
            return self
        part = self.state.part(0, stop - self.start, self.state.position)
        return Loan(part, self.start, self.position, tuple(r for r in self.replaced if r < stop))

    def count_before(self, row: int) -> int:
        """How many rows before this one it serves."""
        return min(max(row - self.start, 0), self.state.num_tokens) - bisect_left(
            self.replaced, row
        )

    def without(self, rows: Collection[int]) -> Loan:
        """The same, but for rows that the slot is to hold itself."""
        replaced = {*self.replaced, *(row for row in rows if self.start <= row < self.stop)}
        return Loan(self.state, self.start, self.position, tuple(sorted(replaced)))

    @cached_property
    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each caching layer, [1, heads, tokens, head_dim]."""
        return [(keys[None], values[None]) for keys, values in self.state.layers()]


class Slot:
    """One request's preallocated buffers, for the rows of its prompt that are not on loan.

    keys, values: one tensor for each of `stacks`, [layers, heads, capacity, head_dim].
    layers: views of them in layer order, keys and values [1, heads, capacity, head_dim].
    positions: [capacity], the position each row was encoded or computed at.
    loans: states that serve rows of the prompt from where they lie, in the prompt's order. Without
        any, row i holds the prompt's i-th token; see `index`.
    """

    __slots__ = ("capacity", "keys", "layers", "loans", "positions", "stacks", "values")

    def __init__(
        self,
        stacks: tuple[Stack, ...],
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def buffer(layers: int, heads: int, dim: int) -> torch.Tensor:
            return _empty((layers, heads, capacity, dim), dtype, device)

        self.stacks = stacks
        self.capacity = capacity
        self.keys = tuple(buffer(len(s.layers), s.shape.key_heads, s.shape.key_dim) for s in stacks)
        self.values = tuple(
            buffer(len(s.layers), s.shape.value_heads, s.shape.value_dim) for s in stacks
        )
        self.layers = [
            (keys[None], values[None]) for keys, values in _by_layer(stacks, self.keys, self.values)
        ]
        self.positions = torch.zeros(capacity, dtype=torch.long, device=device)
        self.loans: list[Loan] = []

    def index(self, row: int) -> int:
        """Where the buffers hold a row of the prompt that is not on loan, or would hold it."""
        return row - sum(loan.count_before(row) for loan in self.loans)

    def own_rows(self, stop: int) -> torch.Tensor:
        """The rows of the prompt before `stop` that the buffers hold, ascending."""
        is_own = torch.ones(stop, dtype=torch.bool)
        for loan in self.loans:
            is_own[loan.start : loan.stop] = False
            is_own[list(loan.replaced)] = True
        return is_own.nonzero()[:, 0]

    def take_back(self, rows: Sequence[int], stop: int) -> None:
        """Make room for rows that are on loan, so that they can be computed.

        rows: of the prompt. stop: how many rows of the prompt the slot holds or is to hold.
        """
        before = self.own_rows(stop)
        self.loans = [loan.without(rows) for loan in self.loans]
        is_before = torch.isin(self.own_rows(stop), before)
        moved = is_before.nonzero()[:, 0].to(self.positions.device)
        held = len(before)
        for tensor in (*self.keys, *self.values):
            tensor.index_copy_(2, moved, tensor[:, :, :held].clone())
        self.positions.index_copy_(0, moved, self.positions[:held].clone())

    def shorten(self, rows: int) -> None:
        """Keep only what loans serve of the prompt's first rows."""
        self.loans = [loan.head(rows) for loan in self.loans if loan.start < rows]

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers; what is on loan is held by others."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def state(self, start: int, token_ids: Sequence[int], position: int) -> KVState:
        """Copy rows `start …` out as the state of `token_ids`, encoded at `position`."""
        return self.state_of(range(start, start + len(token_ids)), token_ids, position)

    def state_of(self, rows: Sequence[int], token_ids: Sequence[int], position: int) -> KVState:
        """Copy any rows out as the state of `token_ids`, the first encoded at `position`."""
        index = torch.tensor(rows, device=self.positions.device)
        return KVState(
            stacks=self.stacks,
            keys=tuple(keys.index_select(2, index) for keys in self.keys),
            values=tuple(values.index_select(2, index) for values in self.values),
            token_ids=tuple(token_ids),
            position=position,
        )

    def copy_rows(self, source: Slot, stop: int) -> None:
        """Copy the prompt's first `stop` rows from another slot; what it has on loan is shared."""
        self.loans = list(source.loans)
        self.shorten(stop)
        stop = self.index(stop)
        for mine, theirs in zip(
            (*self.keys, *self.values), (*source.keys, *source.values), strict=True
        ):
            mine[:, :, :stop].copy_(theirs[:, :, :stop])
        self.positions[:stop].copy_(source.positions[:stop])


def _empty(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Uninitialised memory. NumPy's comes in large pages on Linux, which are quick to touch."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    content = torch.from_numpy(np.empty(nbytes + _ALIGNMENT, np.uint8))
    start = -content.data_ptr() % _ALIGNMENT
    return content[start : start + nbytes].view(dtype).reshape(shape)


def _by_layer(
    stacks: Sequence[Stack], keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Views of stacked tensors, one pair for each caching layer."""
    views: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for stack, stacked_keys, stacked_values in zip(stacks, keys, values, strict=True):
        for index, layer in enumerate(stack.layers):
            views[layer] = (stacked_keys[index], stacked_values[index])
    return [views[layer] for layer in sorted(views)]
