"""Which form of attention is the fastest for which shapes: the table behind `lm/kernels.py`.

One layer's queries attend to rows of a slot. Milliseconds, medians; the forms take turns.

    python benchmarks/attention.py --dtype bfloat16 --threads 2
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from pcache_core.lm import kernels

SHAPES = [
    (tokens, rows)
    for tokens in (1, 4, 16, 32, 64, 128)
    for rows in (300, 1000, 3000, 5000, 16_000)
    if tokens <= rows
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table("tokens", "rows", "flash", "two products", "with log-sum-exp", "used", box=None)
    scratch = kernels.Scratch()
    for tokens, rows in SHAPES:
        make = partial(torch.randn, device=args.device, dtype=getattr(torch, args.dtype))
        query = make(1, args.heads, tokens, args.head_dim)
        key, value = (make(1, args.kv_heads, rows, args.head_dim) for _ in range(2))
        hidden = torch.ones(tokens, rows, device=args.device).triu(rows - tokens + 1).bool()
        bias = make(tokens, rows).zero_().masked_fill_(hidden, torch.finfo(query.dtype).min)
        bias = bias.repeat(args.heads // args.kv_heads, 1)
        scale = args.head_dim**-0.5
        forms: list[Callable[[], object]] = [
            partial(kernels.attend, query, key, value, bias, scale),
            partial(kernels.attend_by_matmul, query, key, value, bias[:, -tokens:], scale, scratch),
            partial(kernels.attend_with_lse, query, key, value, bias, scale),
        ]
        times = _medians(forms, args.rounds)
        used = "two products" if kernels.prefers_matmul(query, key) else "flash"
        table.add_row(str(tokens), str(rows), *(f"{ms:.2f}" for ms in times), used)
    Console().print(table)


def _medians(forms: list[Callable[[], object]], rounds: int) -> list[float]:
    """Milliseconds of each, by turns; the first two rounds warm up and don't count."""
    found: list[list[float]] = [[] for _ in forms]
    for _ in range(rounds + 2):
        for form, times in zip(forms, found, strict=True):
            started = time.perf_counter()
            form()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append((time.perf_counter() - started) * 1000)
    return [median(times[2:]) for times in found]


if __name__ == "__main__":
    main()
