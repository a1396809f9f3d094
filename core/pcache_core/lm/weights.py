"""Noticing that a loaded model's weights are other ones than they were.

Adapters, merges and training steps change a model in place. Nothing that was computed before may be
used after that, and finding out must cost next to nothing where nothing has changed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from operator import is_

import torch
from torch import nn

from pcache_core.lm.packed import follow
from pcache_core.threads import fork_safe

# What the layers of an adapter note about themselves: which adapters act, and how much.
_ADAPTERS = ("_active_adapter", "active_adapter", "_disable_adapters", "merged_adapters")
_SETTINGS = (*_ADAPTERS, "scaling")
# Of every tensor, bytes in so many places are read; as many as make this sum, and 64 at least.
_PLACES = 8
_READ_BYTES = 2**19
_FEWEST_BYTES = 64


class Weights:
    """Numbers the states of a model's weights, as far as looking shows a difference. Thread-safe.

    A look compares the tree of modules, the objects, addresses and version counters of parameters
    and saved buffers, the adapters that act, and some bytes of every tensor, since `p.data += x`
    moves no counter.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._lock = fork_safe(threading.Lock())
        follow(model)
        self._seen: _Sight | None = _Sight(model)
        self._version = 0

    def version(self) -> int:
        """Look at the weights; return a number that was never returned for others."""
        with self._lock:
            if self._seen is None or self._seen.is_outdated():
                follow(self._model)
                self._seen = _Sight(self._model)
                self._version += 1
            return self._version

    def let_go(self) -> None:
        """Keep no tensor that was seen; the next look finds the weights changed."""
        with self._lock:
            self._seen = None


def adapter_settings(model: nn.Module) -> list[str]:
    """Describe which adapters act in each module that has some; its tensors don't show it."""
    return [
        f"{name}: {[module.__dict__.get(setting) for setting in _SETTINGS]}"
        for name, module in model.named_modules()
        if any(setting in module.__dict__ for setting in _ADAPTERS)
    ]


class _Sight:
    """What a look at a model's weights saw."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._tables = [
            table for module in modules for table in (module._modules, module._parameters)
        ]
        self._buffers = [
            (module._buffers, module._non_persistent_buffers_set)
            for module in modules
            if module._buffers
        ]
        self._attributes = [
            module.__dict__
            for module in modules
            if any(name in module.__dict__ for name in _SETTINGS)
        ]
        self._objects = self._read_objects()
        self._settings = repr(self._read_settings())
        tensors = [each for each in self._objects if isinstance(each, torch.Tensor)]
        self._tensors = [tensor for tensor in tensors if type(tensor.data) is torch.Tensor]
        self._tensors = [tensor for tensor in self._tensors if not tensor.is_meta]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._counts = self._read_counts()
        self._addresses = self._read_addresses()
        self._samples = _samples(self._tensors)
        self._bytes = [torch.cat(samples) for samples in self._samples]

    def is_outdated(self) -> bool:
        """Return whether a look would see something else now."""
        objects = self._read_objects()
        return (
            len(objects) != len(self._objects)
            or not all(map(is_, objects, self._objects))
            or self._read_counts() != self._counts
            or self._read_addresses() != self._addresses
            or repr(self._read_settings()) != self._settings
            or not all(
                torch.equal(torch.cat(samples), before)
                for samples, before in zip(self._samples, self._bytes, strict=True)
            )
        )

    def _read_objects(self) -> list[nn.Module | torch.Tensor | None]:
        """Modules, parameters, and those buffers that are saved: others, running changes."""
        found: list[nn.Module | torch.Tensor | None] = [
            each for table in self._tables for each in table.values()
        ]
        for buffers, unsaved in self._buffers:
            found += [buffer for name, buffer in buffers.items() if name not in unsaved]
        return found

    def _read_counts(self) -> list[int]:
        return [tensor._version for tensor in self._counted]

    def _read_addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]

    def _read_settings(self) -> list[object]:
        return [
            attributes[name]
            for attributes in self._attributes
            for name in _SETTINGS
            if name in attributes
        ]


def _samples(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Views of some bytes of every tensor, [places, bytes], those of one device and width together.

    They keep the memory they show, so that no other tensor can come to its address unseen.
    """
    groups: dict[tuple[torch.device, int], list[torch.Tensor]] = {}
    share = max(_READ_BYTES // (_PLACES * max(len(tensors), 1)), _FEWEST_BYTES)
    for tensor in tensors:
        if not tensor.numel():
            continue
        size = tensor.element_size()
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        extent = size * (1 + sum((length - 1) * step for length, step in steps))
        places, width = (_PLACES, share) if extent > _PLACES * share else (1, extent)
        view = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
            tensor.untyped_storage(),
            tensor.storage_offset() * size,
            (places, width),
            ((extent - width) // max(places - 1, 1), 1),
        )
        groups.setdefault((tensor.device, width), []).append(view)
    return list(groups.values())
