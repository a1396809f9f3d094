"""Whether a benchmark will fit into memory, before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from pcache_core import OptionError

_MEMINFO = Path("/proc/meminfo")
_HEADROOM = 0.9  # of what is available


class MemoryNeededError(OptionError):
    """A benchmark needs more memory than there is."""


def check_memory(needed: Mapping[str, int], device: str) -> None:
    """Compare with what is free; nothing is known beyond Linux and CUDA, and then nothing said.

    needed: bytes by what they are for. Raises: MemoryNeededError.
    """
    available = available_nbytes(device)
    total = sum(needed.values())
    if available is not None and total > _HEADROOM * available:
        parts = ", ".join(f"{name} {_gb(nbytes)}" for name, nbytes in needed.items() if nbytes)
        raise MemoryNeededError(
            f"the benchmark needs {_gb(total)} ({parts}), {_gb(available)} is available and "
            f"{_HEADROOM:.0%} of that may be used; take a smaller model, fewer --cached tokens, "
            "--modes or --batch, --tier disk, or fewer peers"
        )


def available_nbytes(device: str) -> int | None:
    """Bytes that can be had without swapping; None where it is not known."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB"
