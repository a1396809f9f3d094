"""How much longer a function takes for four times as much: 4 if it is linear, 16 if quadratic."""

from __future__ import annotations

import gc
from collections.abc import Callable
from time import process_time


def growth(function: Callable[[int], object], size: int) -> float:
    """The ratio of the processor times at `size` and four times that, each the best of three."""
    gc.collect()
    gc.disable()
    try:
        return _best(function, 4 * size) / _best(function, size)
    finally:
        gc.enable()


def _best(function: Callable[[int], object], size: int) -> float:
    times = []
    for _ in range(3):
        start = process_time()
        function(size)
        times.append(process_time() - start)
    return min(times)
