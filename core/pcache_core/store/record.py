"""What a stored state says of itself, and its tensors in the dtype that a store keeps them in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from pcache_core.errors import StateMismatchError
from pcache_core.kv.key import FORMAT_VERSION, ModuleKey
from pcache_core.kv.state import KVState, LayerShape, Stack
from pcache_core.params import StorageDtype
from pcache_core.store.seal import SEAL_BYTES

_TEXT_TOKENS = 64
_TEXT_CHARACTERS = 120


@dataclass(frozen=True, slots=True)
class Record:
    """The header of a stored state.

    digest, token_ids: of its key. position: of the first token when it was encoded.
    dtype: of the state, without `torch.`; `storage` is how the file keeps it.
    model, model_name, namespace, preamble_ids: what the key was made of; empty if unknown.
    text: the first characters of the text, empty if unknown. created: seconds since 1970.
    """

    digest: str
    token_ids: tuple[int, ...]
    position: int
    stacks: tuple[Stack, ...]
    dtype: str
    storage: str
    seal: str
    model: str
    model_name: str
    namespace: str
    preamble_ids: tuple[int, ...]
    text: str
    created: int

    @staticmethod
    def of(
        key: ModuleKey, state: KVState, storage: StorageDtype, seal: str, created: int
    ) -> Record:
        """Return the record of a state that is to be stored under a key."""
        space = key.space
        return Record(
            digest=key.digest,
            token_ids=key.token_ids,
            position=state.position,
            stacks=state.stacks,
            dtype=str(state.keys[0].dtype).removeprefix("torch."),
            storage=storage,
            seal=seal,
            model=space.model if space else "",
            model_name=space.model_name if space else "",
            namespace=space.namespace if space else "",
            preamble_ids=key.preamble_ids,
            text=_start_of_text(key),
            created=created,
        )

    def metadata(self) -> dict[str, str]:
        """As strings, the way safetensors keeps metadata."""
        return {
            "format": f"pcache-state-{FORMAT_VERSION}",
            "key": self.digest,
            "model": self.model,
            "model_name": self.model_name,
            "namespace": self.namespace,
            "dtype": self.dtype,
            "storage": self.storage,
            "seal": self.seal,
            "created": str(self.created),
            "position": str(self.position),
            "stacks": json.dumps([_stack_to_list(stack) for stack in self.stacks]),
            "text": self.text,
            "preamble_ids": json.dumps(self.preamble_ids),
            "token_ids": json.dumps(self.token_ids),
        }

    @staticmethod
    def parse(metadata: Mapping[str, str]) -> Record:
        """Read what `metadata` wrote.

        Raises: StateMismatchError: another format or version. KeyError, TypeError, ValueError:
            not metadata of a state.
        """
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("metadata must be strings")
        if metadata["format"] != f"pcache-state-{FORMAT_VERSION}":
            raise StateMismatchError(
                f"format {metadata['format']!r:.40}, this version reads pcache-state-"
                f"{FORMAT_VERSION}"
            )
        if metadata["seal"] not in SEAL_BYTES:
            raise ValueError("unknown seal")
        return Record(
            digest=metadata["key"],
            token_ids=_integers(json.loads(metadata["token_ids"])),
            position=_natural(metadata["position"]),
            stacks=tuple(_stack_from_list(item) for item in json.loads(metadata["stacks"])),
            dtype=metadata["dtype"],
            storage=metadata["storage"],
            seal=metadata["seal"],
            model=metadata["model"],
            model_name=metadata["model_name"],
            namespace=metadata["namespace"],
            preamble_ids=_integers(json.loads(metadata["preamble_ids"])),
            text=metadata["text"],
            created=_natural(metadata["created"]),
        )

    def check_is_of(self, key: ModuleKey) -> None:
        """Raises: StateMismatchError: the record is of another key, or of other tokens."""
        space = key.space
        if space is not None and (self.model, self.namespace) != (space.model, space.namespace):
            raise StateMismatchError("the state is of another model or namespace")
        if self.digest != key.digest:
            raise StateMismatchError(f"the state is of key {self.digest[:16]!r}")
        if self.token_ids != key.token_ids:
            raise StateMismatchError("the state is of other tokens")


def _start_of_text(key: ModuleKey) -> str:
    if key.space is None or key.space.decode is None:
        return ""
    text = key.space.decode(key.token_ids[:_TEXT_TOKENS])[:_TEXT_CHARACTERS]
    return text.rstrip("\ufffd")  # the last token may end inside a character


def _stack_to_list(stack: Stack) -> list[object]:
    shape = stack.shape
    return [shape.key_heads, shape.key_dim, shape.value_heads, shape.value_dim, stack.layers]


def _stack_from_list(item: list[object]) -> Stack:
    *sizes, layers = item
    return Stack(LayerShape(*_integers(sizes)), _integers(layers))


def _natural(text: str) -> int:
    (number,) = _integers([int(text)])
    return number


def _integers(values: object) -> tuple[int, ...]:
    """Raises: ValueError: anything but a list of integers from 0 up."""
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        raise ValueError("not a list of integers")
    if values and min(values) < 0:
        raise ValueError("not a list of natural numbers")
    return tuple(values)


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


def stored_fields(record: Record) -> list[Field]:
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
