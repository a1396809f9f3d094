"""Attention states: what a module leaves behind, and the buffers a request attends over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, eq=False)
class KVState:
    """Keys and values of a module's tokens, every layer; treated as immutable.

    keys, values: one tensor a layer that caches, [heads, tokens, head_dim].
    token_ids: the module's tokens, without its anchor.
    position: of the first token when it was encoded; the others follow without a gap.
    """

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

    def check(self, layers: Sequence[LayerShape], dtype: torch.dtype) -> None:
        """Raises: StateMismatchError: shapes or dtype are not this model's, or tensors disagree."""
        if len(self.keys) != len(layers) or len(self.values) != len(layers):
            raise StateMismatchError(
                f"state has {len(self.keys)} key and {len(self.values)} value layers, "
                f"the model caches {len(layers)}"
            )
        tokens = self.num_tokens
        for index, shape in enumerate(layers):
            for name, tensor, heads, dim in (
                ("keys", self.keys[index], shape.key_heads, shape.key_dim),
                ("values", self.values[index], shape.value_heads, shape.value_dim),
            ):
                expected = (heads, tokens, dim)
                if tuple(tensor.shape) != expected or tensor.dtype != dtype:
                    raise StateMismatchError(
                        f"{name} of layer {index} are {tuple(tensor.shape)} {tensor.dtype}, "
                        f"this model and module need {expected} {dtype}"
                    )


class Slot:
    """One request's preallocated buffers; row i holds the prompt's i-th token.

    keys, values: one tensor a layer that caches, [1, heads, capacity, head_dim].
    positions: [capacity], the position each row was encoded or computed at.
    """

    __slots__ = ("capacity", "keys", "positions", "values")

    def __init__(
        self,
        layers: Sequence[LayerShape],
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        self.keys = [
            torch.empty(1, s.key_heads, capacity, s.key_dim, dtype=dtype, device=device)
            for s in layers
        ]
        self.values = [
            torch.empty(1, s.value_heads, capacity, s.value_dim, dtype=dtype, device=device)
            for s in layers
        ]
        self.positions = torch.zeros(capacity, dtype=torch.long, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def state(self, start: int, token_ids: Sequence[int], position: int) -> KVState:
        """Copy rows `start …` out as the state of `token_ids`, encoded at `position`."""
        stop = start + len(token_ids)
        return KVState(
            keys=tuple(keys[0, :, start:stop].clone() for keys in self.keys),
            values=tuple(values[0, :, start:stop].clone() for values in self.values),
            token_ids=tuple(token_ids),
            position=position,
        )

    def copy_rows(self, source: Slot, stop: int) -> None:
        """Copy the first `stop` rows of another slot."""
        for mine, theirs in zip(
            (*self.keys, *self.values), (*source.keys, *source.values), strict=True
        ):
            mine[:, :, :stop].copy_(theirs[:, :, :stop])
        self.positions[:stop].copy_(source.positions[:stop])
