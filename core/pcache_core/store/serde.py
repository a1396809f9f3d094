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

import io
import json
import logging
import struct
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import torch

from pcache_core.errors import StateMismatchError
from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import Block, KVState, Part, Stack, layer_blocks
from pcache_core.params import StorageDtype, check_storage_dtype
from pcache_core.report import StoreStats, Tier
from pcache_core.store.base import Counters, Opened, OpeningReads
from pcache_core.store.record import (
    DTYPE_CODES,
    Field,
    Record,
    pack,
    stored_fields,
    unpack,
)
from pcache_core.store.seal import SEAL_BYTES, Seal

logger = logging.getLogger(__name__)

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
    offsets: dict[str, tuple[Field, int]]
    nbytes: int


def encode(
    key: ModuleKey, state: KVState, storage: StorageDtype, seal: Seal, created: int
) -> list[memoryview]:
    """Return the stored form, as buffers to be written one after another.

    Raises: StateMismatchError: the state is not of the key's tokens, its tensors do not fit its
        shapes, or their dtype can't be kept.
    """
    if state.token_ids != key.token_ids or not (state.keys and state.token_ids):
        raise StateMismatchError("the state to be stored is empty or of other tokens than its key")
    state.check(state.stacks, state.keys[0].dtype)
    layout = layout_of(Record.of(key, state, storage, seal.name, created))
    packed = pack(state, layout.record)
    buffers = [memoryview(layout.header)]
    buffers += [_bytes_of(packed[name]) for name in layout.offsets if name != _SEAL]
    return [*buffers, memoryview(seal.of(buffers))]


Source = Callable[[], io.RawIOBase | io.BytesIO]
"""Opens the stored bytes of a state for reading from the first."""

_Fill = Callable[[torch.Tensor], None]


class SealedState:
    """A stored state that is read when it is used, and checked while it is.

    Its header was compared with the key. It is read into memory that nobody else can change, and
    what was read is hashed right before it is handed out, so that copying finds it in the cache;
    after the last of it the seal is compared. To hash once for each version of a file would save a
    quarter of the time, but a bit that flips later, on the disk, changes no size and no date.

    Raises: OSError: it can't be read. StateMismatchError: cut short, of another key, or sealed
        otherwise.
    """

    def __init__(self, source: Source, key: ModuleKey, seal: Seal) -> None:
        self._source = source
        self._key = key
        self._seal = seal
        with source() as file:
            self._layout = self._read_layout(file)
        self.stacks: tuple[Stack, ...] = self._layout.record.stacks
        self.token_ids: tuple[int, ...] = self._layout.record.token_ids
        self.position: int = self._layout.record.position

    @property
    def num_tokens(self) -> int:
        """Tokens in the module."""
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        """Bytes as it is kept."""
        return self._layout.nbytes

    def check(self, stacks: tuple[Stack, ...], dtype: torch.dtype) -> None:
        """Raises: StateMismatchError: shapes or dtype are not this model's."""
        if self.stacks != stacks:
            raise StateMismatchError("the state's layers are not those of this model")
        if self._layout.record.dtype != str(dtype).removeprefix("torch."):
            raise StateMismatchError(
                f"the state is {self._layout.record.dtype}, this model needs {dtype}"
            )

    def blocks(self) -> Iterator[Block]:
        """As kept: int8 with scales where the store has int8. A block is good until the next.

        Raises: StateMismatchError: after the last block, if a byte is not as it was written.
        """
        with self._reading() as (layout, fill):
            rows = {name: field for name, (field, _) in layout.offsets.items() if _is_rows(name)}
            scales = _new(layout.offsets[next(iter(rows))][1] - len(layout.header))
            fill(scales)
            pieces = [(name, layers) for name, field in rows.items() for layers in _pieces(field)]
            fields = [
                replace(rows[name], shape=(layers.stop - layers.start, *rows[name].shape[1:]))
                for name, layers in pieces
            ]
            buffer = _new(max(field.nbytes for field in fields))
            for (name, layers), field in zip(pieces, fields, strict=True):
                raw = buffer[: field.nbytes]
                fill(raw)
                part, _, index = name.partition(".")
                scale = None
                if field.dtype == torch.int8:
                    scale = _tensor(scales, layout, f"{name}.scale")[layers]
                yield Block(int(index), cast(Part, part), layers, _shaped(raw, field), scale)

    def whole(self) -> KVState:
        """Return the state in the dtype it was put in.

        Raises: StateMismatchError: a byte is not as it was written.
        """
        with self._reading() as (layout, fill):
            raw = _new(layout.nbytes - len(layout.header) - self._seal.nbytes)
            fill(raw)
        return unpack(layout.record, lambda name: _tensor(raw, layout, name))

    @contextmanager
    def _reading(self) -> Iterator[tuple[Layout, _Fill]]:
        """Read from the beginning; compare the seal when everything before it was asked for.

        Yields: where things are, and what fills tensors with the bytes after the header, in order.
        Raises: StateMismatchError: caused by an OSError where it could not be read.
        """
        try:
            with self._source() as file:
                layout = self._read_layout(file)
                # It may have been replaced by another writing of the same state.
                if replace(layout.record, created=0) != replace(self._layout.record, created=0):
                    raise StateMismatchError("it was changed after it was opened")
                checked = self._seal.start()
                checked.update(memoryview(layout.header))

                def fill(raw: torch.Tensor) -> None:
                    view = raw.numpy().data
                    _read_into(file, view)
                    checked.update(view)

                yield layout, fill
                rest = memoryview(file.read(self._seal.nbytes + 1) or b"")
                if not self._seal.fits(checked, rest):
                    raise StateMismatchError("its bytes are not those that were written")
        except OSError as error:
            raise StateMismatchError(f"it can't be read: {error.strerror or error}") from error

    def _read_layout(self, file: io.RawIOBase | io.BytesIO) -> Layout:
        nbytes = file.seek(0, io.SEEK_END)
        layout = read_layout(read_header(file), nbytes)
        record = layout.record
        record.check_is_of(self._key)
        if record.seal != self._seal.name:
            raise StateMismatchError(
                f"it is sealed with {record.seal}, this store's is {self._seal.name}"
            )
        return layout


class SealedStore(OpeningReads):
    """What stores that keep states as sealed bytes have in common.

    storage_dtype, hmac_key: as for `DiskStore`.
    """

    def __init__(
        self,
        tier: Tier,
        budget_bytes: int | None,
        storage_dtype: StorageDtype,
        hmac_key: bytes | None,
    ) -> None:
        self.storage_dtype = check_storage_dtype(storage_dtype)
        self._seal = Seal(hmac_key)
        self._tier: Tier = tier
        self._counters = Counters(tier, budget_bytes)

    @abstractmethod
    def delete(self, key: ModuleKey) -> None:
        """Forget the state if it is there."""

    def stats(self) -> StoreStats:
        """Return the counts so far. What a server holds in all is not known here."""
        return self._counters.stats(states=None, nbytes=None)

    def _name(self, key: ModuleKey) -> str:
        """Name a state: one kept in another dtype is another."""
        auto = self.storage_dtype == "auto"
        return key.digest if auto else f"{key.digest}.{self.storage_dtype}"

    def _encoded(self, key: ModuleKey, state: KVState) -> list[memoryview]:
        """Return the bytes of a state that is to be kept; none if it can't be."""
        try:
            return encode(key, state, self.storage_dtype, self._seal, int(time.time()))
        except StateMismatchError as error:
            logger.warning("a state is not kept: %s", error)
            return []

    def _opened(self, key: ModuleKey, source: Source, read_ms: float) -> Opened | None:
        """Open a state; None if it is damaged, and dropped.

        Raises: OSError: it can't be read.
        """
        try:
            rows = SealedState(source, key, self._seal)
        except StateMismatchError as error:
            self._drop(key, error)
            return None

        def settle(load_ms: float, error: StateMismatchError | None) -> None:
            if error is not None:
                self._drop(key, error)
                return
            self._counters.add(hits=1, load_ms=read_ms + load_ms, loaded_nbytes=rows.nbytes)
            self._used(key)

        return Opened(rows, self._tier, rows.nbytes, settle)

    def _used(self, key: ModuleKey) -> None:
        """Note that a state was read and is whole."""

    def _drop(self, key: ModuleKey, error: StateMismatchError) -> None:
        """Delete a damaged state; the look-up was a miss."""
        logger.warning("dropped the stored state %s: %s", self._name(key), error)
        self._counters.add(damaged=1, misses=1)
        self.delete(key)


def read_header(file: io.RawIOBase | io.BytesIO) -> bytes:
    """Read a file's header, from its first byte to its first tensor's.

    Raises: OSError. StateMismatchError: cut short, or longer than any header of ours.
    """
    nbytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    prefix = file.read(PREFIX_BYTES) or b""
    length = header_nbytes(prefix)
    return prefix + (file.read(min(length, nbytes) - len(prefix)) or b"")


def _read_into(file: io.RawIOBase | io.BytesIO, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise StateMismatchError("it is cut short")
        done += count


def _is_rows(name: str) -> bool:
    part, _, index = name.partition(".")
    return part in ("keys", "values") and index.isdecimal()  # others are scales and the seal


def _new(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def _pieces(field: Field) -> Iterator[slice]:
    return layer_blocks(torch.empty(()).expand(field.shape))


def _tensor(raw: torch.Tensor, layout: Layout, name: str) -> torch.Tensor:
    """Return a tensor of a file; `raw` holds the bytes after its header, [bytes] uint8."""
    field, start = layout.offsets[name]
    start -= len(layout.header)
    return _shaped(raw[start : start + field.nbytes], field)


def _shaped(raw: torch.Tensor, field: Field) -> torch.Tensor:
    return raw.view(field.dtype).reshape(field.shape)


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
    seal = Field(_SEAL, torch.uint8, (SEAL_BYTES[record.seal],))
    table: dict[str, object] = {"__metadata__": record.metadata()}
    starts: dict[str, tuple[Field, int]] = {}
    end = 0
    for field in (*stored_fields(record), seal):
        starts[field.name] = (field, end)
        table[field.name] = {
            "dtype": DTYPE_CODES[field.dtype],
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
    """Return a contiguous CPU tensor's bytes, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
