"""Identity of a model: its configuration and every bit of its weights."""

from __future__ import annotations

import json

import torch
from transformers import PreTrainedModel

from pcache_core.kv.key import digest
from pcache_core.lm.weights import adapter_settings

_CHUNK = 2**20
# Where the model came from and how it is run do not change what it computes.
_IRRELEVANT = (
    "_name_or_path", "name_or_path", "_model_name_or_path", "transformers_version",
    "_attn_implementation",
)  # fmt: skip


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the configuration, a checksum of all bits of each tensor, and active adapters.

    The checksum weights each element's bits by its place, so that no exchange goes unseen; weights
    are read once, where they are, and packed ones unpacked one at a time.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _IRRELEVANT}
    fields = [json.dumps(config, sort_keys=True, default=str).encode()]
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        fields += [name.encode(), str(tuple(tensor.shape)).encode(), str(tensor.dtype).encode()]
        fields.append(str(_checksum(tensor)).encode())
    fields += [setting.encode() for setting in adapter_settings(model)]
    return digest(fields)


def _checksum(tensor: torch.Tensor) -> list[int]:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().to_dense().contiguous().flatten().view(integers[tensor.element_size()])
    weights = torch.arange(1, _CHUNK + 1, device=bits.device)
    sums = []
    for chunk in torch.split(bits, _CHUNK):
        sums.append(int((chunk * weights[: len(chunk)]).sum()))  # wraps around, the same every time
    return sums
