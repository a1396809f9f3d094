"""Moving a state to another position by the model's own rotary angles.

A rotary embedding multiplies each pair of dimensions by a rotation whose angle is position times
frequency. Moving a stored row is one more rotation, by the difference of the two angles the model
itself would form, so nothing about the embedding has to be known but its frequencies and which
dimensions they turn; `fit` finds those out by encoding the same tokens at two places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from pcache_core.kv.sequence import KVBuffers
from pcache_core.kv.state import KVState, Part, StateSource

# Largest relative error of a right rotation beyond twice the layer's own drift, by dtype.
_FLOOR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_LARGEST_DRIFT = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """How one layer's states turn when they move.

    part: what turns; multi-head latent attention keeps its rotary part in `values`.
    frequencies: [pairs], fp32, radians per position.
    layout: pairs are (i, i + pairs) or (2i, 2i + 1), both from dimension `offset` on.
    sign: -1 for models that rotate backwards.
    """

    part: Part
    frequencies: torch.Tensor
    layout: Literal["half", "interleaved"]
    offset: int
    sign: int

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for rotations that turn alike."""
        return (self.part, id(self.frequencies), self.layout, self.offset, self.sign)

    def angles(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """[tokens, pairs], fp64: the angle the model forms at `new` less the one at `old`.

        Each product is rounded to fp32 as the model does; a single product with the difference
        drifts by 2e-2 at 120,000 positions.
        """
        frequencies = self.frequencies.to(old.device)
        at_new = (new.float()[:, None] * frequencies).double()
        at_old = (old.float()[:, None] * frequencies).double()
        return (at_new - at_old) * self.sign

    def turn(
        self, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Write `rows`, rotated, to `out`; both [..., tokens, dim]; fp32 inside, one rounding.

        cos, sin: [tokens, pairs].
        """
        start, stop = self.offset, self.offset + 2 * cos.shape[-1]
        if self.layout == "half":
            middle = (start + stop) // 2
            first, second = slice(start, middle), slice(middle, stop)
        else:
            first, second = slice(start, stop, 2), slice(start + 1, stop, 2)
        scale = cos.new_ones(*cos.shape[:-1], rows.shape[-1])
        scale[..., first] = scale[..., second] = cos
        exact = rows.float()
        turned = exact * scale
        turned[..., first].addcmul_(exact[..., second], sin, value=-1)
        turned[..., second].addcmul_(exact[..., first], sin)
        out.copy_(turned)


Layer = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, [heads, tokens, dim]."""

Rotations = tuple[Rotation | None, ...]
"""One for each caching layer; None where states don't depend on positions."""


def place(
    buffers: KVBuffers,
    start: int,
    state: StateSource,
    rotations: Rotations,
    position: int | None = None,
) -> None:
    """Copy a state into rows `start …` of buffers, moved to `position` (default: `start`).

    One pass over the state, a few layers at a time: whatever has to be checked, made from int8 or
    turned is in the cache when it is, and no second copy of the state is made on the way.

    Raises: StateMismatchError: the state was damaged where it is kept, and so are these rows now.
    """
    position = start if position is None else position
    rows = slice(start, start + state.num_tokens)
    new = _positions(state, position, buffers.positions.device)
    buffers.positions[rows] = new
    old = _positions(state, state.position, new.device)
    turns: dict[int, _Turn] = {}
    for block in state.blocks():
        targets = buffers.keys if block.part == "keys" else buffers.values
        out = targets[block.stack][block.layers, :, rows]
        layers = buffers.stacks[block.stack].layers[block.layers]
        for run, rotation in _runs([rotations[layer] for layer in layers]):
            source = block.rows[run]
            scale = None if block.scale is None else block.scale[run]
            if rotation is None or rotation.part != block.part or position == state.position:
                _copy(source, scale, out[run])
                continue
            name = id(rotation.frequencies)
            if name not in turns:
                angles = rotation.angles(old, new)
                turns[name] = (angles.cos().float(), angles.sin().float())
            _turn(rotation, source, scale, turns[name], out[run])


_Turn = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, [tokens, pairs] fp32."""


def _copy(rows: torch.Tensor, scale: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write rows to `out`, [layers, heads, tokens, dim], in its dtype."""
    if scale is None:
        out.copy_(rows)
        return
    torch.mul(rows.to(out.device), scale.to(out.device), out=out)


def _turn(
    rotation: Rotation,
    rows: torch.Tensor,
    scale: torch.Tensor | None,
    turn: _Turn,
    out: torch.Tensor,
) -> None:
    """Write rows to `out`, turned."""
    exact = rows.to(out.device)
    if scale is not None:
        exact = exact * scale.to(out.device)
    rotation.turn(exact, *turn, out=out)


def _runs(rotations: Sequence[Rotation | None]) -> list[tuple[slice, Rotation | None]]:
    """Neighbouring layers that turn alike: few large operations instead of many small ones."""
    runs: list[tuple[slice, Rotation | None]] = []
    for index, rotation in enumerate(rotations):
        if runs and runs[-1][1] is rotation:
            runs[-1] = (slice(runs[-1][0].start, index + 1), rotation)
        else:
            runs.append((slice(index, index + 1), rotation))
    return runs


def fit(frequencies: Sequence[torch.Tensor], here: KVState, there: KVState) -> Rotations:
    """Return each layer's likeliest rotation, from the same tokens encoded alone at two places.

    The best is not always good: `misfit` says whether the rotations explain a move.
    """
    pairs = zip(here.layers(), there.layers(), strict=True)
    places = (here.position, there.position)
    best = [_best(frequencies, old, new, places) for old, new in pairs]
    known: dict[tuple[object, ...], Rotation] = {}  # equal rotations become one object
    return tuple(r if r is None else known.setdefault(r.identity, r) for r in best)


def misfit(rotations: Rotations, here: KVState, there: KVState) -> str:
    """Return why the rotations don't turn `here` into `there`; empty if they do.

    A layer's drift, how much its states moved that no rotation touches, is its own noise; an error
    within twice of it, beside the dtype's rounding, is not a misfit.
    """
    pairs = zip(here.layers(), there.layers(), strict=True)
    places = (here.position, there.position)
    for layer, (rotation, (old, new)) in enumerate(zip(rotations, pairs, strict=True)):
        error = max(_errors(rotation, old, new, places))
        drift = min(_errors(None, old, new, places))
        limit = 2 * drift + _FLOOR.get(old[0].dtype, 1e-5)
        if drift >= _LARGEST_DRIFT or error > limit:
            return (
                f"no rotation moves the states of layer {layer} from position {here.position} "
                f"to {there.position} (relative error {error:.1e})"
            )
    return ""


def _best(
    frequencies: Sequence[torch.Tensor], old: Layer, new: Layer, places: tuple[int, int]
) -> Rotation | None:
    candidates = [None, *_candidates(frequencies, *old)]
    return min(candidates, key=lambda rotation: max(_errors(rotation, old, new, places)))


def _errors(
    rotation: Rotation | None, old: Layer, new: Layer, places: tuple[int, int]
) -> tuple[float, float]:
    """Relative errors of keys and values after turning one layer from one place to another."""
    keys, values = old
    if rotation is not None:
        steps = torch.arange(keys.shape[1], device=keys.device)
        angles = rotation.angles(places[0] + steps, places[1] + steps)
        rows = keys if rotation.part == "keys" else values
        turned = torch.empty_like(rows)
        rotation.turn(rows, angles.cos().float(), angles.sin().float(), out=turned)
        keys, values = (turned, values) if rotation.part == "keys" else (keys, turned)
    return relative_error(keys, new[0]), relative_error(values, new[1])


def _positions(state: StateSource, first: int, device: torch.device) -> torch.Tensor:
    return torch.arange(first, first + state.num_tokens, device=device)


def _candidates(
    frequencies: Sequence[torch.Tensor], keys: torch.Tensor, values: torch.Tensor
) -> Iterator[Rotation]:
    parts: tuple[tuple[Part, int], ...] = (
        ("keys", keys.shape[-1]),
        ("values", values.shape[-1]),
    )
    layouts: tuple[Literal["half", "interleaved"], ...] = ("half", "interleaved")
    for part, dim in parts:
        for vector in frequencies:
            turned = 2 * len(vector)
            if turned > dim:
                continue
            for offset in {0, dim - turned}:
                for layout in layouts:
                    for sign in (1, -1):
                        yield Rotation(part, vector, layout, offset, sign)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of `expected`."""
    difference = (actual.float() - expected.float()).pow(2).mean().sqrt()
    return float(difference / expected.float().pow(2).mean().sqrt().clamp_min(1e-12))


def rotary_frequencies(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return every rotary frequency vector the model owns, [pairs] fp32, without duplicates."""
    found: list[torch.Tensor] = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name and buffer.ndim == 1:
                found.append(buffer.detach().float().clone())
        table = getattr(module, "embed_positions", None)
        if isinstance(table, torch.Tensor) and table.ndim == 2 and len(table) > 1:
            found.append(_frequencies_of_table(table.detach().double().cpu()).to(table.device))
    unique: list[torch.Tensor] = []
    for vector in found:
        if not any(vector.shape == u.shape and torch.equal(vector, u) for u in unique):
            unique.append(vector)
    return unique


def _frequencies_of_table(table: torch.Tensor) -> torch.Tensor:
    """Frequencies behind a table of sines and cosines by position, [positions, 2 * pairs] (GPT-J).

    Row 1 says roughly, the row of the largest power of two exactly: there the model's own product
    with the position was not rounded.
    """
    pairs = table.shape[1] // 2
    row = 1 << ((len(table) - 1).bit_length() - 1)
    rough = torch.atan2(table[1, :pairs], table[1, pairs:])
    angle = torch.atan2(table[row, :pairs], table[row, pairs:])
    turns = torch.round((rough * row - angle) / (2 * torch.pi))
    return ((angle + 2 * torch.pi * turns) / row).float()
