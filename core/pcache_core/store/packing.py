"""Tensors of a state in the dtype that a store keeps them in, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from pcache_core.errors import StateMismatchError
from pcache_core.kv.state import KVState
from pcache_core.store.record import Record

# The dtypes that states come in, and those that files hold, by their safetensors names.
_STATE_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "float64": torch.float64,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
)
DTYPE_CODES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.int8: "I8",
        torch.uint8: "U8",
    }
)
_INT8_MAX = 127


@dataclass(frozen=True, slots=True)
class Field:
    """A tensor of a stored state: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def fields(record: Record) -> list[Field]:
    """Return the tensors that a state of this record is kept as, in the file's order.

    Wider elements come first, so that every tensor is aligned. Nothing is allocated.
    Raises: StateMismatchError: a dtype that no state is kept in.
    """
    shapes = dict(_shapes(record))
    dtype = _stored_dtype(record)
    stored = [Field(name, dtype, shape) for name, shape in shapes.items()]
    if dtype != torch.int8:
        return stored
    scales = [
        Field(f"{name}.scale", torch.float32, (*shape[:2], 1, shape[3]))
        for name, shape in shapes.items()
    ]
    return scales + stored


def pack(state: KVState, record: Record) -> dict[str, torch.Tensor]:
    """Return the state's tensors by field name, on the CPU, contiguous.

    int8: symmetric, one scale for each layer, head and channel over the module's tokens. Keys are
    kept as they are, rotated: turning them to position 0 first lowers their error by 4%, but turns
    the rounding back with them, and moved the built-in model's answers no less (KL from unrounded
    states over 40 questions: 6e-7 nats as they are, 3e-6 turned).
    Raises: StateMismatchError: a dtype that can't be kept, or int8 of what is not finite.
    """
    dtype = _stored_dtype(record)
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(state):
        if dtype == torch.int8:
            packed[f"{name}.scale"], packed[name] = _quantise(tensor)
        else:
            packed[name] = tensor.detach().to("cpu", dtype).contiguous()
    return packed


def unpack(record: Record, tensor: Callable[[str], torch.Tensor]) -> KVState:
    """Return the state again, in the dtype it was put in.

    tensor: a field's tensor by name. Of `auto` these very tensors are returned, not copies.
    """
    dtype = _STATE_DTYPES[record.dtype]

    def restored(name: str) -> torch.Tensor:
        stored = tensor(name)
        if stored.dtype != torch.int8:
            return stored.to(dtype)
        out = torch.empty(stored.shape, dtype=dtype)
        return torch.mul(stored, tensor(f"{name}.scale"), out=out)

    count = range(len(record.stacks))
    return KVState(
        stacks=record.stacks,
        keys=tuple(restored(f"keys.{index}") for index in count),
        values=tuple(restored(f"values.{index}") for index in count),
        token_ids=record.token_ids,
        position=record.position,
    )


def _quantise(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [layers, heads, 1, dim] fp32 and the nearest multiples of them, int8."""
    exact = tensor.detach().float()
    if not torch.isfinite(exact).all():
        raise StateMismatchError("a state with numbers that are not finite can't be kept as int8")
    largest = exact.abs().amax(dim=2, keepdim=True)
    scale = largest / _INT8_MAX
    steps = exact / torch.where(scale > 0, scale, 1)
    levels = steps.round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8)
    return scale.cpu().contiguous(), levels.cpu().contiguous()


def _stored_dtype(record: Record) -> torch.dtype:
    known = {**{name: name for name in _STATE_DTYPES}, "auto": record.dtype}
    if record.dtype not in _STATE_DTYPES or record.storage not in (*known, "int8"):
        raise StateMismatchError(
            f"a state of {record.dtype!r:.20} can't be kept as {record.storage!r:.20}"
        )
    return torch.int8 if record.storage == "int8" else _STATE_DTYPES[known[record.storage]]


def _shapes(record: Record) -> Iterator[tuple[str, tuple[int, ...]]]:
    tokens = len(record.token_ids)
    for index, stack in enumerate(record.stacks):
        shape, layers = stack.shape, len(stack.layers)
        yield f"keys.{index}", (layers, shape.key_heads, tokens, shape.key_dim)
        yield f"values.{index}", (layers, shape.value_heads, tokens, shape.value_dim)


def _tensors(state: KVState) -> Iterator[tuple[str, torch.Tensor]]:
    for index, (keys, values) in enumerate(zip(state.keys, state.values, strict=True)):
        yield f"keys.{index}", keys
        yield f"values.{index}", values
