"""Attention states: the keys and values that a module leaves behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

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


class StateSource(Protocol):
    """A state that can be copied into buffers: in memory, or where a store keeps it."""

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
        """Return all of it in the model's dtype. Raises: StateMismatchError: it is damaged."""


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
        return by_layer(self.stacks, self.keys, self.values)

    def part(self, start: int, stop: int, position: int) -> KVState:
        """Return a view of tokens `start … stop` as a state, the first encoded at `position`."""
        return KVState(
            stacks=self.stacks,
            keys=tuple(keys[:, :, start:stop] for keys in self.keys),
            values=tuple(values[:, :, start:stop] for values in self.values),
            token_ids=self.token_ids[start:stop],
            position=position,
        )

    def blocks(self) -> Iterator[Block]:
        """Yield its tensors, a few layers at a time."""
        parts: tuple[tuple[Part, Sequence[torch.Tensor]], ...]
        parts = (("keys", self.keys), ("values", self.values))
        for index in range(len(self.stacks)):
            for part, tensors in parts:
                for layers in layer_blocks(tensors[index]):
                    yield Block(index, part, layers, tensors[index][layers])

    def whole(self) -> KVState:
        """Return itself."""
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


def by_layer(
    stacks: Sequence[Stack], keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Views of stacked tensors, one pair for each caching layer."""
    views: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for stack, stacked_keys, stacked_values in zip(stacks, keys, values, strict=True):
        for index, layer in enumerate(stack.layers):
            views[layer] = (stacked_keys[index], stacked_values[index])
    return [views[layer] for layer in sorted(views)]
