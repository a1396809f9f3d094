"""The bytes of a stored state: any reader of safetensors opens them, ours believes none that
was altered, cut, forged or meant for another key."""

from __future__ import annotations

import io
import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save

from pcache_core import OptionError, StateMismatchError
from pcache_core.kv.key import KeySpace, ModuleKey
from pcache_core.kv.state import KVState
from pcache_core.store import serde
from pcache_core.store.seal import Seal
from stored_states import SPACE, make, same

PLAIN, KEYED = Seal(), Seal(b"k" * 32)


def stored(key: ModuleKey, state: KVState, seal: Seal = PLAIN, storage: str = "auto") -> bytes:
    return b"".join(serde.encode(key, state, storage, seal, 1_700_000_000))  # type: ignore[arg-type]


def load(content: bytes, key: ModuleKey, seal: Seal = PLAIN) -> KVState:
    return serde.SealedState(lambda: io.BytesIO(content), key, seal).whole()


def forged(content: bytes, change: Any) -> bytes:
    """The file with another header and a checksum that fits it."""
    length = struct.unpack("<Q", content[:8])[0]
    table = json.loads(content[8 : 8 + length])
    text = change(table)
    if not isinstance(text, bytes):
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
    body = struct.pack("<Q", len(text)) + text + content[8 + length : -16]
    return body + xxhash.xxh3_128(body).digest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("seal", [PLAIN, KEYED], ids=["checksum", "hmac"])
def test_a_state_comes_back_bit_by_bit(dtype: torch.dtype, seal: Seal) -> None:
    key, state = make(5, 6, 7, dtype=dtype)
    assert same(load(stored(key, state, seal), key, seal), state)


def test_the_file_is_safetensors_with_the_state_in_it(tmp_path: Path) -> None:
    key, state = make(5, 6, 7)
    path = tmp_path / "state.safetensors"
    path.write_bytes(stored(key, state))
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"keys.0", "values.0", "keys.1", "values.1", "seal"}
        assert torch.equal(file.get_tensor("keys.1"), state.keys[1])
        assert torch.equal(file.get_tensor("values.0"), state.values[0])
        assert bytes(file.get_tensor("seal").numpy()) == path.read_bytes()[-16:]
        assert file.metadata() == {
            "format": "pcache-state-2",
            "key": key.digest,
            "model": "a" * 64,
            "model_name": "random",
            "namespace": "default",
            "dtype": "float32",
            "storage": "auto",
            "seal": "xxh3-128",
            "created": "1700000000",
            "position": "3",
            "stacks": "[[2, 8, 2, 8, [0, 1, 2]], [1, 4, 1, 6, [3]]]",
            "text": "w5 w6 w7",
            "preamble_ids": "[1, 2, 3]",
            "token_ids": "[5, 6, 7]",
        }


def test_the_seal_is_xxh3_over_every_byte_before_it() -> None:
    content = stored(*make(1, 2))
    assert content[-16:] == xxhash.xxh3_128(content[:-16]).digest()


@pytest.mark.parametrize("seal", [PLAIN, KEYED], ids=["checksum", "hmac"])
def test_a_flipped_bit_in_any_byte_is_found(seal: Seal, capsys: pytest.CaptureFixture[str]) -> None:
    key, state = make(5, 6)
    content = stored(key, state, seal)
    found = 0
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1 << index % 8
        with pytest.raises(StateMismatchError):
            load(bytes(damaged), key, seal)
        found += 1
    print(f"{found} of {len(content)} flipped bytes found")
    assert found == len(content)


def test_a_file_cut_anywhere_is_found() -> None:
    key, state = make(5, 6)
    content = stored(key, state)
    for length in range(1, len(content)):
        with pytest.raises(StateMismatchError):
            load(content[:length], key)
    with pytest.raises(StateMismatchError):
        load(content + b"\0", key)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table["__metadata__"].update(format="pcache-state-1"),
        lambda table: table["__metadata__"].update(format="pcache-state-3"),
        lambda table: table["__metadata__"].update(key="f" * 64),
        lambda table: table["__metadata__"].update(model="b" * 64),
        lambda table: table["__metadata__"].update(namespace="other"),
        lambda table: table["__metadata__"].update(token_ids="[5, 7]"),
        lambda table: table["__metadata__"].update(dtype="float16"),
        lambda table: table["__metadata__"].update(dtype="object"),
        lambda table: table["__metadata__"].update(storage="int4"),
        lambda table: table["__metadata__"].update(seal="none"),
        lambda table: table["__metadata__"].update(text=5),
        lambda table: table["__metadata__"].update(position="-1"),
        lambda table: table["__metadata__"].update(stacks="[[2, 8, 2, 8]]"),
        lambda table: table["__metadata__"].update(stacks="[" * 100_000),
        lambda table: table["__metadata__"].update(token_ids="9" * 10_000),
        lambda table: table["__metadata__"].update(token_ids='{"5": 6}'),
        lambda table: table["__metadata__"].pop("created"),
        lambda table: table["__metadata__"].update(note="one more"),
        lambda table: table.update(__metadata__=[1]),
        lambda table: table["keys.0"].update(shape=[3, 2, 2**40, 8]),
        lambda table: table["keys.0"].update(data_offsets=[0, 2**62]),
        lambda table: table["keys.0"].update(dtype="BF16"),
        lambda table: table.pop("values.0"),
        lambda table: table.update(more={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
        lambda table: b"[" * 10_000,
        lambda table: b"null",
        lambda table: b"\xff\xfe{}",
        lambda table: b"",
    ],
)
def test_a_header_we_would_not_write_is_refused_even_with_a_checksum_that_fits(
    change: Any,
) -> None:
    key, state = make(5, 6)
    content = stored(key, state)
    assert same(load(forged(content, lambda table: None), key), state)
    with pytest.raises(StateMismatchError):
        load(forged(content, change), key)


def test_a_header_that_claims_terabytes_is_refused_at_once() -> None:
    """In its length, and in shapes that agree with each other and a key of as many tokens."""
    key, state = make(5, 6)
    content = stored(key, state)
    started = time.perf_counter()
    for length in (2**63, 2**42, 2**26 + 1, len(content)):
        with pytest.raises(StateMismatchError, match=r"header|cut"):
            load(struct.pack("<Q", length) + content[8:], key)
    terabytes = "[[1000000, 1000000, 1000000, 1000000, [0]]]"
    layout = serde.read_layout(content[: serde.header_nbytes(content)], len(content))
    claimed = {**layout.record.metadata(), "stacks": terabytes}
    hostile = serde.layout_of(serde.Record.parse(claimed))
    assert hostile.nbytes > 2**42
    body = hostile.header + bytes(64)
    with pytest.raises(StateMismatchError, match="should have 16,000,000,"):
        load(body + xxhash.xxh3_128(body).digest(), key)
    assert time.perf_counter() - started < 5


def test_a_safetensors_file_of_something_else_is_refused() -> None:
    key, _ = make(5, 6)
    with pytest.raises(StateMismatchError):
        load(save({"weight": torch.ones(4)}), key)


def test_the_state_of_another_key_is_refused() -> None:
    key, state = make(5, 6)
    content = stored(key, state)
    other_model = KeySpace("b" * 64, "torch.float32", "default")
    other_namespace = KeySpace(SPACE.model, "torch.float32", "other")
    for other in (
        make(5, 7)[0],
        make(5, 6, space=other_model)[0],
        make(5, 6, space=other_namespace)[0],
        SPACE.key((1, 2), (5, 6), None),
        SPACE.key((1, 2, 3), (5, 6), 9),
        ModuleKey("0" * 64, (5, 6)),
        ModuleKey(key.digest, (5, 7)),
    ):
        with pytest.raises(StateMismatchError):
            load(content, other)
    assert same(load(content, ModuleKey(key.digest, (5, 6))), state)


def test_a_state_of_other_tokens_or_shapes_is_not_written() -> None:
    key, state = make(5, 6)
    with pytest.raises(StateMismatchError, match="other tokens"):
        stored(make(5, 7)[0], state)
    ragged = KVState(state.stacks, state.values[::-1], state.values, state.token_ids, 0)
    with pytest.raises(StateMismatchError):
        stored(key, ragged)


def test_only_the_holder_of_the_key_makes_states_that_are_believed() -> None:
    key, state = make(5, 6)
    for content in (stored(key, state), stored(key, state, Seal(b"x" * 32))):
        with pytest.raises(StateMismatchError):
            load(content, key, KEYED)
    with pytest.raises(StateMismatchError, match="sealed with hmac"):
        load(stored(key, state, KEYED), key)


@pytest.mark.parametrize("secret", [b"", b"short", "s" * 32, 7])
def test_a_bad_hmac_key_is_refused(secret: Any) -> None:
    with pytest.raises(OptionError, match="16 bytes"):
        Seal(secret)
