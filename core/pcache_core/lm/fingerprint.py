"""Identity of a model: its configuration and every bit of its weights."""

from __future__ import annotations

import json

import torch
from transformers import PreTrainedModel

from pcache_core.key import digest

_SAMPLES = 64
# Where the model came from and how it is run do not change what it computes.
_IRRELEVANT = ("_name_or_path", "name_or_path", "transformers_version", "_attn_implementation")


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the configuration and, for each tensor, a checksum of all its bits.

    The checksum is the sum of the bit patterns with evenly spaced values beside it, so weights
    are read once at memory speed.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _IRRELEVANT}
    fields = [json.dumps(config, sort_keys=True, default=str).encode()]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        fields += [name.encode(), str(tuple(tensor.shape)).encode(), str(tensor.dtype).encode()]
        fields.append(str(_checksum(tensor)).encode())
    return digest(fields)


def _checksum(tensor: torch.Tensor) -> list[int]:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().flatten().view(integers[tensor.element_size()])
    if not len(bits):
        return []
    samples = bits[:: max(1, len(bits) // _SAMPLES)]
    return [int(bits.sum(dtype=torch.int64)), *samples.tolist()]
