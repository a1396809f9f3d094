"""Moving states: the same rows as rotating at the new position in the first place."""

from __future__ import annotations

import pytest
import torch

from pcache_core.kv.sequence import KVBuffers
from pcache_core.kv.state import KVState, LayerShape, stack_layers
from pcache_core.lm.relocation import Rotation, place

PAIRS = 8
TOKENS = 5
FREQUENCIES = 500_000.0 ** (-torch.arange(PAIRS, dtype=torch.float32) / PAIRS)


def embed(rows: torch.Tensor, position: int, rotation: Rotation) -> torch.Tensor:
    """Rotary embedding in fp64 by complex numbers, from the fp32 product the models form."""
    positions = torch.arange(position, position + rows.shape[-2], dtype=torch.float32)
    angles = (positions[:, None] * rotation.frequencies).double() * rotation.sign
    turned = rows.double().clone()
    part = turned[..., rotation.offset : rotation.offset + 2 * PAIRS]
    if rotation.layout == "half":
        numbers = torch.complex(part[..., :PAIRS], part[..., PAIRS:])
    else:
        numbers = torch.complex(part[..., 0::2], part[..., 1::2])
    numbers = numbers * torch.polar(torch.ones_like(angles), angles)
    if rotation.layout == "half":
        part.copy_(torch.cat([numbers.real, numbers.imag], dim=-1))
    else:
        part.copy_(torch.stack([numbers.real, numbers.imag], dim=-1).flatten(-2))
    return turned


def move(
    rotation: Rotation, old: int, new: int, dtype: torch.dtype, dim: int = 2 * PAIRS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of two layers moved by `place`, and embedded at the new position; the turned part."""
    torch.manual_seed(0)
    raw = torch.randn(2, 3, TOKENS, dim)
    other = torch.randn(2, 3, TOKENS, dim).to(dtype)
    stacks = stack_layers([LayerShape(3, dim, 3, dim)] * 2)
    encoded = embed(raw, old, rotation).to(dtype)
    keys, values = (encoded, other) if rotation.part == "keys" else (other, encoded)
    state = KVState(stacks, (keys,), (values,), tuple(range(TOKENS)), old)
    buffers = KVBuffers(stacks, 12, dtype=dtype, device=torch.device("cpu"))
    place(buffers, 4, state, (rotation, rotation), new)
    moved = buffers.keys[0] if rotation.part == "keys" else buffers.values[0]
    kept = buffers.values[0] if rotation.part == "keys" else buffers.keys[0]
    assert torch.equal(kept[:, :, 4 : 4 + TOKENS], other)
    assert buffers.positions[4 : 4 + TOKENS].tolist() == list(range(new, new + TOKENS))
    return moved[:, :, 4 : 4 + TOKENS].double(), embed(raw, new, rotation)


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("offset", [0, 6])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_moved_state_equals_one_encoded_there(
    part: str, layout: str, offset: int, sign: int
) -> None:
    rotation = Rotation(part, FREQUENCIES, layout, offset, sign)  # type: ignore[arg-type]
    for old, new in ((3, 900), (900, 3), (0, 120_000), (17, 17)):
        moved, expected = move(rotation, old, new, torch.float32, dim=2 * PAIRS + 6)
        assert (moved - expected).abs().max() < 2e-6


def test_a_moved_half_precision_state_is_rounded_once_more_and_not_worse() -> None:
    rotation = Rotation("keys", FREQUENCIES, "half", 0, 1)
    moved, expected = move(rotation, 3, 5000, torch.bfloat16)
    direct = expected.to(torch.bfloat16).double()
    assert (moved - expected).pow(2).mean() < 3 * (direct - expected).pow(2).mean()


def test_layers_that_turn_differently_are_moved_each_by_its_own() -> None:
    slow = Rotation("keys", FREQUENCIES / 10, "half", 0, 1)
    fast = Rotation("keys", FREQUENCIES, "half", 0, 1)
    rotations = (fast, None, slow, slow)
    torch.manual_seed(1)
    raw = torch.randn(4, 3, TOKENS, 2 * PAIRS)
    stacks = stack_layers([LayerShape(3, 2 * PAIRS, 3, 2 * PAIRS)] * 4)

    def encode(position: int) -> torch.Tensor:
        layers = [
            raw[i] if turn is None else embed(raw[i], position, turn).float()
            for i, turn in enumerate(rotations)
        ]
        return torch.stack(layers)

    state = KVState(stacks, (encode(2),), (raw,), tuple(range(TOKENS)), 2)
    buffers = KVBuffers(stacks, 64, dtype=torch.float32, device=torch.device("cpu"))
    place(buffers, 40, state, rotations)
    torch.testing.assert_close(buffers.keys[0][:, :, 40:45], encode(40), rtol=0, atol=5e-6)


def test_layers_of_several_shapes_keep_their_order() -> None:
    shapes = [LayerShape(1, 2, 1, 2), LayerShape(2, 4, 1, 2), LayerShape(1, 2, 1, 2)]
    stacks = stack_layers(shapes)
    buffers = KVBuffers(stacks, 3, dtype=torch.float32, device=torch.device("cpu"))
    for number, (keys, values) in enumerate(buffers.layers):
        assert keys.shape == (1, shapes[number].key_heads, 3, shapes[number].key_dim)
        keys.fill_(number)
        values.fill_(number)
    state = buffers.state((0, 1), (7, 8), 0)
    assert [float(keys.max()) for keys, _ in state.layers()] == [0, 1, 2]
    assert state.nbytes == 2 * 4 * sum(shape.elements_per_token for shape in shapes)
