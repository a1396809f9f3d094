"""Linear layers whose weights lie as oneDNN reads them, which takes a third of the time or half.

torch multiplies by a weight as it lies, row after row; a processor reads blocks faster. A layer is
packed once and keeps no other copy. Nothing else of the model changes, and a layer that is asked
for its weight is an ordinary one again: adapters, training and saving find what they expect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from pcache_core.errors import ModelError

_OWN = ("packed", "was_trainable")  # attributes that an ordinary layer has not


class PackedLinear(nn.Linear):
    """A linear layer that was packed in place.

    It has a `weight` beside the packed one only where that is the embeddings' too. Copies of it,
    by `copy` or `pickle`, are ordinary layers.
    """

    packed: torch.Tensor
    was_trainable: bool

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply; [..., in_features] to [..., out_features]."""
        if inputs.requires_grad and torch.is_grad_enabled():
            outputs = _multiply(inputs.detach(), self.packed, self._parameters["bias"])
            outputs.requires_grad_().register_hook(_refuse_gradient)  # type: ignore[no-untyped-call]
            return outputs
        return _multiply(inputs, self.packed, self._parameters["bias"])

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._parameters["weight"] is None:
            _unpack(self)
            return self.weight
        return super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name not in _OWN}
        state["_parameters"] = self._parameters | {"weight": _weight(self)}
        return object.__new__, (nn.Linear,), state

    def _apply(self, *arguments: Any, **options: Any) -> nn.Module:
        _unpack(self)
        return self._apply(*arguments, **options)

    def _save_to_state_dict(
        self,
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,  # noqa: FBT001
    ) -> None:
        """Save the weight; as it is, packed, with `keep_vars`."""
        if self._parameters["weight"] is None:
            destination[f"{prefix}weight"] = self.packed if keep_vars else self.packed.to_dense()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any
    ) -> None:
        if f"{prefix}weight" in state_dict:
            _unpack(self)
        nn.Linear._load_from_state_dict(self, state_dict, prefix, *arguments)


@torch.inference_mode(mode=False)
@torch.no_grad()
def pack(model: PreTrainedModel) -> None:
    """Pack every `nn.Linear` in bfloat16 on the CPU; one at a time, so that no memory is added.

    Of a weight that is the embeddings' too, the model's head gets a packed copy.
    """
    modules = list(model.modules())
    uses = Counter(id(weight) for module in modules for weight in module._parameters.values())
    head = model.get_output_embeddings()
    for module in modules:
        # A subclass may do more than multiply, and so may a replaced `forward`.
        if type(module) is nn.Linear and "forward" not in vars(module):
            weight = module._parameters.get("weight")
            if weight is not None and (uses[id(weight)] == 1 or module is head):
                _pack(module, weight, keeps_weight=uses[id(weight)] > 1)


@torch.no_grad()
def leave_file(model: nn.Module) -> None:
    """Give the other weights memory of their own, so that the file that is mapped goes."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def unpack(model: nn.Module) -> None:
    """Make all layers ordinary ones again, bit for bit."""
    for layer in packed_layers(model):
        _unpack(layer)


def follow(model: nn.Module) -> None:
    """Pack again what is a copy of a weight that may have changed."""
    for layer in packed_layers(model):
        weight = layer._parameters["weight"]
        if weight is not None:
            _unpack(layer)
            _pack(layer, weight, keeps_weight=True)


def packed_layers(model: nn.Module) -> Iterator[PackedLinear]:
    """Return the layers that are packed."""
    return (module for module in model.modules() if isinstance(module, PackedLinear))


def num_weights(model: PreTrainedModel) -> int:
    """Count weights as `num_parameters` does, packed ones too."""
    hidden = [layer.packed for layer in packed_layers(model) if layer._parameters["weight"] is None]
    return int(model.num_parameters()) + sum(weight.numel() for weight in hidden)


def _multiply(
    inputs: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    outputs: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
    return outputs


def _pack(layer: nn.Linear, weight: nn.Parameter, *, keeps_weight: bool) -> None:
    if type(weight.data) is not torch.Tensor or weight.device.type != "cpu":
        return
    if weight.dtype != torch.bfloat16 or not _can_pack():  # float32 gains nothing in decoding
        return
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
    vars(layer).update(packed=packed, was_trainable=weight.requires_grad)
    layer._parameters["weight"] = weight if keeps_weight else None
    layer.__class__ = PackedLinear


def _unpack(layer: PackedLinear) -> None:
    layer._parameters["weight"] = _weight(layer)
    layer.__class__ = nn.Linear  # type: ignore[assignment]
    for name in _OWN:
        delattr(layer, name)


@torch.inference_mode(mode=False)
def _weight(layer: PackedLinear) -> nn.Parameter:
    weight = layer._parameters["weight"]
    if weight is None:
        weight = nn.Parameter(layer.packed.to_dense(), requires_grad=layer.was_trainable)
    return weight


@cache
@torch.inference_mode(mode=False)
@torch.no_grad()
def _can_pack() -> bool:
    """Return whether torch, as it was built, multiplies packed bfloat16 weights on this CPU."""
    try:
        weight = (torch.arange(32 * 32) % 7 - 3).view(32, 32).bfloat16()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        return torch.equal(_multiply(weight, packed, None), nn.functional.linear(weight, weight))
    except (AttributeError, RuntimeError):
        return False


def _refuse_gradient(_: torch.Tensor) -> NoReturn:
    raise ModelError("packed weights have no gradients; call unpack() of the CausalLM first")
