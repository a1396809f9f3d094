"""States ↔ bytes: a safetensors file whose last tensor seals everything before it.

```
u64  length of the header, little-endian
     header: JSON of metadata and tensors, padded with spaces so that tensors start on 64 bytes
     keys.0, values.0, keys.1, …   (int8: their scales before them)
     seal: checksum or HMAC of every byte before it
```
Any safetensors reader can open it. Ours accepts one header for each state, the one it would write
itself, byte for byte; so every length, shape and offset is known to be right, and the file's length
to be exactly theirs, before a tensor is made.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch

from pcache_core.errors import StateMismatchError
from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import Block, KVState, Part, Stack, layer_blocks
from pcache_core.store import packing
from pcache_core.store.record import Record, StorageDtype
from pcache_core.store.seal import SEAL_BYTES, Hash, Seal

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 64 * 2**20
_ALIGNMENT = 64
_SEAL = "seal"
_MOST_REMEMBERED_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in a stored state.

    header: the bytes before the first tensor. nbytes: of the whole, the seal included.
    """

    record: Record
    header: bytes
    offsets: dict[str, tuple[packing.Field, int]]
    nbytes: int


def encode(
    key: ModuleKey, state: KVState, storage: StorageDtype, seal: Seal, created: int
) -> list[memoryview]:
    """The stored form, as buffers to be written one after another.

    Raises: StateMismatchError: the state is not of the key's tokens, its tensors do not fit its
        shapes, or their dtype can't be kept.
    """
    if state.token_ids != key.token_ids or not (state.keys and state.token_ids):
        raise StateMismatchError("the state to be stored is empty or of other tokens than its key")
    state.check(state.stacks, state.keys[0].dtype)
    layout = layout_of(Record.of(key, state, storage, seal.name, created))
    packed = packing.pack(state, layout.record)
    buffers = [memoryview(layout.header)]
    buffers += [_bytes_of(packed[name]) for name in layout.offsets if name != _SEAL]
    return [*buffers, memoryview(seal.of(buffers))]


class SealedState:
    """A stored state that is read when it is used, and checked while it is.

    Its header was compared with the key. Every byte is hashed each time it is read, block by block
    right before the block is handed out, so that copying finds it in the cache; the last block is
    followed by the comparison with the seal. To hash once for each version of a file would save a
    quarter of the time, but a bit that flips later, on the disk, changes no size and no date.

    raw: [bytes] uint8, all of it; not copied.
    """

    def __init__(self, raw: torch.Tensor, layout: Layout, seal: Seal) -> None:
        self.stacks: tuple[Stack, ...] = layout.record.stacks
        self.token_ids: tuple[int, ...] = layout.record.token_ids
        self.position: int = layout.record.position
        self._raw = raw
        self._layout = layout
        self._seal = seal

    @property
    def num_tokens(self) -> int:
        """Tokens in the module."""
        return len(self.token_ids)

    def check(self, stacks: tuple[Stack, ...], dtype: torch.dtype) -> None:
        """Raises: StateMismatchError: shapes or dtype are not this model's."""
        if self.stacks != stacks:
            raise StateMismatchError("the state's layers are not those of this model")
        if self._layout.record.dtype != str(dtype).removeprefix("torch."):
            raise StateMismatchError(
                f"the state is {self._layout.record.dtype}, this model needs {dtype}"
            )

    def blocks(self) -> Iterator[Block]:
        """As kept: int8 with scales where the store has int8.

        Raises: StateMismatchError: behind the last block, if a byte is not as it was written.
        """
        view, done, checked = self._raw.numpy().data, 0, self._seal.start()
        for name, (field, start) in self._layout.offsets.items():
            part, _, index = name.partition(".")
            if part not in ("keys", "values") or not index.isdecimal():
                continue  # scales and the seal
            rows = self._tensor(name)
            scale = self._tensor(f"{name}.scale") if field.dtype == torch.int8 else None
            layer_nbytes = field.nbytes // len(rows)
            for layers in layer_blocks(rows):
                end = start + layers.stop * layer_nbytes
                checked.update(view[done:end])
                done = end
                own = None if scale is None else scale[layers]
                yield Block(int(index), cast(Part, part), layers, rows[layers], own)
        self._compare(checked, view[done:])

    def whole(self) -> KVState:
        """The state in the dtype it was put in; views of `raw` where that is how it is kept."""
        view, checked = self._raw.numpy().data, self._seal.start()
        end = self._layout.nbytes - self._seal.nbytes
        checked.update(view[:end])
        self._compare(checked, view[end:])
        return packing.unpack(self._layout.record, self._tensor)

    def _compare(self, checked: Hash, rest: memoryview) -> None:
        """rest: what was not hashed. Were it more than the seal, it would not fit."""
        if not self._seal.fits(checked, rest):
            raise StateMismatchError("its bytes are not those that were written")

    def _tensor(self, name: str) -> torch.Tensor:
        field, start = self._layout.offsets[name]
        return self._raw[start : start + field.nbytes].view(field.dtype).reshape(field.shape)


def open_state(raw: torch.Tensor, key: ModuleKey, seal: Seal) -> SealedState:
    """The state in `raw`, [bytes] uint8; its header and length are right, its numbers unread.

    Raises: StateMismatchError: cut short, of another key, or sealed otherwise.
    """
    view = raw.numpy().data
    layout = read_layout(view[: header_nbytes(view[:PREFIX_BYTES])], len(view))
    record = layout.record
    record.check_is_of(key)
    if record.seal != seal.name:
        raise StateMismatchError(f"it is sealed with {record.seal}, this store's is {seal.name}")
    return SealedState(raw, layout, seal)


def decode(raw: torch.Tensor, key: ModuleKey, seal: Seal) -> KVState:
    """The state in `raw`, [bytes] uint8; its tensors are views of `raw` where no dtype changes.

    Raises: StateMismatchError: damaged, of another key, or sealed otherwise.
    """
    return open_state(raw, key, seal).whole()


def header_nbytes(prefix: bytes | memoryview) -> int:
    """Bytes before the first tensor, read from the first eight.

    Raises: StateMismatchError: cut short, or longer than any header of ours.
    """
    if len(prefix) < PREFIX_BYTES:
        raise StateMismatchError("it is cut short")
    (length,) = struct.unpack("<Q", prefix[:PREFIX_BYTES])
    if length > MAX_HEADER_BYTES:
        raise StateMismatchError(
            f"its header claims {length:,} bytes, the limit is {MAX_HEADER_BYTES:,}"
        )
    return PREFIX_BYTES + int(length)


def read_layout(header: bytes | memoryview, total_nbytes: int) -> Layout:
    """Parse a header of a file of `total_nbytes`.

    Raises: StateMismatchError: not a header this version would write, or the length is not its.
    """
    layout = parse_header(header)
    if layout.nbytes != total_nbytes:
        raise StateMismatchError(f"it has {total_nbytes:,} bytes and should have {layout.nbytes:,}")
    return layout


def parse_header(header: bytes | memoryview) -> Layout:
    """Parse what `header_nbytes` delimits.

    Raises: StateMismatchError: not a header this version would write.
    """
    if len(header) > _MOST_REMEMBERED_BYTES:
        return _parse_header(bytes(header))
    return _parse_again(bytes(header))


def _parse_header(header: bytes) -> Layout:
    try:
        metadata = json.loads(header[PREFIX_BYTES:])["__metadata__"]
        layout = layout_of(Record.parse(metadata))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise StateMismatchError(f"its header is not a state's ({type(error).__name__})") from None
    if layout.header != header:
        raise StateMismatchError("its header is not as it was written")
    return layout


# Equal bytes have equal layouts, and parsing 1,000 token ids takes as long as checking 5 MB.
_parse_again = lru_cache(maxsize=256)(_parse_header)


def layout_of(record: Record) -> Layout:
    """Lay out a state's tensors: the header that describes them, and where each begins."""
    seal = packing.Field(_SEAL, torch.uint8, (SEAL_BYTES[record.seal],))
    table: dict[str, object] = {"__metadata__": record.metadata()}
    starts: dict[str, tuple[packing.Field, int]] = {}
    end = 0
    for field in (*packing.fields(record), seal):
        starts[field.name] = (field, end)
        table[field.name] = {
            "dtype": packing.DTYPE_CODES[field.dtype],
            "shape": field.shape,
            "data_offsets": (end, end + field.nbytes),
        }
        end += field.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(PREFIX_BYTES + len(text)) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise StateMismatchError(f"a state of {len(record.token_ids):,} tokens has no header")
    header = struct.pack("<Q", len(text)) + text
    offsets = {name: (field, len(header) + start) for name, (field, start) in starts.items()}
    return Layout(record, header, offsets, len(header) + end)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
