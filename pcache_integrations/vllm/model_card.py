"""What the connector has to know of a model: found by the engine's self-test, sent as JSON.

vLLM joins and splits weights, so that a model's fingerprint can't be taken inside it; and how its
states turn when they move was measured by the engine on the same weights. Both come with the
command that starts the server.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from pcache_core import CausalLM
from pcache_core.errors import ModelError
from pcache_core.kv.state import LayerShape, Stack, stack_layers
from pcache_core.lm.relocation import Rotation, Rotations

_SHAPE = ("key_heads", "key_dim", "value_heads", "value_dim")


@dataclass(frozen=True, slots=True, eq=False)
class ModelCard:
    """A model whose states vLLM may use.

    model: fingerprint of configuration and weights. dtype: of weights and states, without
    `torch.`. layers: shapes of what each layer caches. rotations: how states turn, by layer.
    context_length: its most positions, None without a limit.
    """

    name: str
    model: str
    dtype: str
    layers: tuple[LayerShape, ...]
    rotations: Rotations
    context_length: int | None

    @classmethod
    def of(cls, lm: CausalLM) -> ModelCard:
        """Return the card of a loaded model.

        Raises: ModelError: its states can't be moved, or are not rows of equal keys and values.
        """
        if lm.support.kind not in ("relocatable", "position-free"):
            raise ModelError(
                f"{lm.name}: vLLM can't be served states of this model: {lm.support.reason}"
            )
        uneven = [s for s in lm.layers if (s.key_heads, s.key_dim) != (s.value_heads, s.value_dim)]
        if uneven or lm.support.stable_length is not None:
            raise ModelError(
                f"{lm.name}: vLLM can't be served states of this model: its layers keep keys and "
                "values of different shapes, or turn by angles that depend on the prompt's length"
            )
        rotations = lm.support.rotations or (None,) * len(lm.layers)
        dtype = str(lm.dtype).removeprefix("torch.")
        return cls(lm.name, lm.fingerprint, dtype, lm.layers, rotations, lm.context_length)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The states' dtype."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """How states hold the layers."""
        return stack_layers(self.layers)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it. Layers that turn alike share an entry."""
        turning: dict[tuple[object, ...], dict[str, Any]] = {}
        for index, rotation in enumerate(self.rotations):
            if rotation is not None:
                entry = turning.setdefault(rotation.identity, {"layers": [], **_entry(rotation)})
                entry["layers"].append(index)
        shapes = groupby([getattr(layer, name) for name in _SHAPE] for layer in self.layers)
        return {
            "name": self.name,
            "model": self.model,
            "dtype": self.dtype,
            "layers": [[len(list(same)), *shape] for shape, same in shapes],
            "rotations": list(turning.values()),
            "context_length": self.context_length,
        }

    @classmethod
    def from_dict(cls, card: Mapping[str, Any]) -> ModelCard:
        """Read what `as_dict` wrote. Raises: ModelError: it is not a card."""
        try:
            layers = tuple(
                LayerShape(*shape) for count, *shape in card["layers"] for _ in range(count)
            )
            rotations: list[Rotation | None] = [None] * len(layers)
            for entry in card["rotations"]:
                rotation = _rotation(entry)
                for index in entry["layers"]:
                    rotations[index] = rotation
            own = (card["name"], card["model"], card["dtype"])
            return cls(*own, layers, tuple(rotations), card["context_length"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ModelError(
                f"the connector's model card can't be read ({type(error).__name__}: {error}); "
                "start the server with the command that `pcache serve` prints"
            ) from error


def _entry(rotation: Rotation) -> dict[str, Any]:
    frequencies = rotation.frequencies.detach().cpu().float().numpy().astype("<f4")
    return {
        "part": rotation.part,
        "layout": rotation.layout,
        "offset": rotation.offset,
        "sign": rotation.sign,
        "frequencies": base64.b64encode(frequencies.tobytes()).decode(),
    }


def _rotation(entry: Mapping[str, Any]) -> Rotation:
    content = np.frombuffer(base64.b64decode(entry["frequencies"]), "<f4")
    frequencies = torch.from_numpy(content.astype(np.float32))
    return Rotation(entry["part"], frequencies, entry["layout"], entry["offset"], entry["sign"])
