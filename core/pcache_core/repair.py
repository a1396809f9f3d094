"""Which reused tokens are computed again: document heads, and what the question looks at. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pcache_core.params import RepairPolicy

Run = tuple[int, int]
"""Rows `start … stop` of a module that was encoded apart from what stands before it."""


def head_rows(policy: RepairPolicy, modules: Sequence[Run], reused: int) -> list[int]:
    """The first rows of each module; `reused`: how many of the prompt's tokens states may fill.

    Where `max_ratio` leaves less than `head_tokens` for each, all heads are shortened alike.
    """
    limit = int(policy.max_ratio * reused) - query_count(policy, reused)
    lengths = sorted(stop - start for start, stop in modules)
    longest = min(policy.head_tokens, lengths[-1]) if lengths else 0
    while longest and sum(min(longest, length) for length in lengths) > limit:
        longest -= 1
    return [row for start, stop in modules for row in range(start, min(start + longest, stop))]


def query_count(policy: RepairPolicy, reused: int) -> int:
    """How many rows the question chooses."""
    return int(min(policy.query_ratio, policy.max_ratio) * reused)


def spread_rows(policy: RepairPolicy, modules: Sequence[Run], reused: int) -> list[int]:
    """What to repair where attention can't be observed: longer heads, as many rows in all."""
    count = len(head_rows(policy, modules, reused)) + query_count(policy, reused)
    rows = [(row - start, row) for start, stop in modules for row in range(start, stop)]
    return sorted(row for _, row in sorted(rows)[:count])


def most_attended(rows: Sequence[int], attention: torch.Tensor, count: int) -> list[int]:
    """`count` of the rows: those with most attention, each with the row behind it.

    What a token means in its context, models write into the token that follows it as well.

    attention: [rows of the prompt].
    """
    by_attention = torch.argsort(attention[torch.tensor(rows)], descending=True, stable=True)
    candidates = set(rows)
    chosen: dict[int, None] = {}
    for index in by_attention.tolist():
        for row in (rows[index], rows[index] + 1):
            if row in candidates and len(chosen) < count:
                chosen[row] = None
    return list(chosen)
