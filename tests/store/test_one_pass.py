"""Reading a stored state into buffers: one pass, whatever it is kept as, and checked on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from pcache_core import DiskStore, StateMismatchError
from pcache_core.kv.sequence import KVBuffers
from pcache_core.kv.state import KVState
from pcache_core.lm import place
from pcache_core.lm.relocation import Rotation
from pcache_core.store import Opened
from stored_states import STACKS, make

ROTATION = Rotation("keys", torch.tensor([1.0, 0.1]), "half", 0, 1)
TOKENS = 40_000
START, MOVED = 5, 91


class LargestNew(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made, views and `out=` not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if tensor.untyped_storage().data_ptr() not in known:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for each in value for t in _tensors(each)] if isinstance(value, list | tuple) else []


def opened(store: DiskStore, token_ids: tuple[int, ...]) -> tuple[Opened, KVState]:
    key, state = make(*token_ids, copies=TOKENS // len(token_ids))
    assert store.put(key, state)
    (found,) = store.open_many([key])
    assert found is not None
    return found, state


def slot_for(state: KVState) -> KVBuffers:
    buffers = KVBuffers(
        STACKS, state.num_tokens + 100, dtype=torch.float32, device=torch.device("cpu")
    )
    for tensor in (*buffers.keys, *buffers.values):
        tensor.fill_(-7)
    return buffers


def kept(path: Path, name: str) -> torch.Tensor:
    """What the file holds, read by the safetensors library: steps times their scale for int8."""
    tensors = load_file(path)
    scale = tensors.get(f"{name}.scale", torch.ones(()))
    return tensors[name].double() * scale.double()


def turned(keys: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """Pairs (0, 2) and (1, 3) of the first four channels, as complex numbers.

    The model forms its angles in float32, so each of the two is rounded.
    """
    steps = torch.arange(keys.shape[2])
    at_new, at_old = ((p + steps).float()[:, None] * ROTATION.frequencies for p in (new, old))
    angles = at_new.double() - at_old.double()  # [tokens, pairs]
    pairs = torch.complex(keys[..., :2], keys[..., 2:4]) * torch.polar(
        torch.ones(1).double(), angles
    )
    return torch.cat([pairs.real, pairs.imag, keys[..., 4:]], dim=-1)


@pytest.mark.parametrize("storage", ["auto", "bfloat16", "int8"])
@pytest.mark.parametrize("position", [3, MOVED])
def test_rows_are_what_was_stored_moved_and_nothing_large_is_made_on_the_way(
    tmp_path: Path, storage: Any, position: int
) -> None:
    found, state = opened(DiskStore(tmp_path, storage_dtype=storage), (3, 1, 4, 1, 5))
    buffers = slot_for(state)
    with LargestNew() as made:
        place(buffers, START, found.rows, (ROTATION,) * 4, position)
    (path,) = tmp_path.rglob("*.safetensors")
    rows = slice(START, START + state.num_tokens)
    tolerance = {"rtol": 0, "atol": 2e-6}
    for index in range(len(STACKS)):
        keys, values = kept(path, f"keys.{index}"), kept(path, f"values.{index}")
        keys = turned(keys, state.position, position)
        torch.testing.assert_close(buffers.keys[index][:, :, rows].double(), keys, **tolerance)
        torch.testing.assert_close(buffers.values[index][:, :, rows].double(), values, **tolerance)
        around = torch.cat(
            [buffers.keys[index][:, :, :START], buffers.keys[index][:, :, rows.stop :]], 2
        )
        assert (around == -7).all()
    assert buffers.positions[rows].tolist() == list(range(position, position + state.num_tokens))
    assert made.nbytes < state.nbytes / 4


@pytest.mark.parametrize("storage", ["auto", "int8"])
def test_a_byte_that_changed_before_or_after_the_first_read_is_found_each_time(
    tmp_path: Path, storage: Any
) -> None:
    """Every read is checked: that the file was whole a moment ago proves nothing."""
    store = DiskStore(tmp_path, storage_dtype=storage)
    found, state = opened(store, (2, 7))
    buffers = slot_for(state)
    place(buffers, START, found.rows, (None,) * 4)
    (path,) = tmp_path.rglob("*.safetensors")
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size - 1000)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))
    (again,) = store.open_many([make(2, 7, copies=TOKENS // 2)[0]])
    assert again is not None
    with pytest.raises(StateMismatchError, match="not those that were written"):
        place(buffers, START, again.rows, (None,) * 4)
    with pytest.raises(StateMismatchError):
        again.rows.whole()
