"""Print the table of tested model families, as it stands in docs/models.md.

python tests/equivalence/table.py
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny_models
from pcache_core import CausalLM

HEADER = "| family | documents | why not more |\n|---|---|---|"


def rows() -> Iterator[str]:
    """A line for each kind of support and reason, with the families that it holds for."""
    families: dict[tuple[str, str], list[str]] = {}
    for name in tiny_models.ARCHITECTURES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            support = CausalLM(tiny_models.build(name), tiny_models.tiny_tokenizer()).support
        reason = "" if support.kind == "fixed-positions" else support.reason
        families.setdefault((support.kind, reason), []).append(name)
    for (kind, reason), names in families.items():
        yield f"| {', '.join(names)} | `{kind}` | {reason or _usual_reason(kind)} |"


def _usual_reason(kind: str) -> str:
    return "learned positions are part of the states" if kind == "fixed-positions" else ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(HEADER)
    for row in rows():
        print(row)
