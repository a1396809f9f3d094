"""From samples to rows: medians, and ratios within each round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median

from pcache_integrations.bench.figures import Order, Row, Sample, Spread
from pcache_integrations.bench.ways import FLOOR, Way

Samples = dict[tuple[str, Order], list[Sample | None]]
"""Of each way and order, round by round; None where there was no answer."""


def rows_of(cached_size: int, ways: Sequence[Way], samples: Samples) -> tuple[Row, ...]:
    """A row for each way and order that answered at least once, those that know nothing first."""
    orders: tuple[Order, ...] = ("cold", "same", "new", "floor")
    return tuple(
        _row(cached_size, way, order, samples)
        for order in orders
        for way in ways
        if any(samples.get((way.name, order), ()))
    )


def _row(cached_size: int, way: Way, order: Order, samples: Samples) -> Row:
    mine = samples[way.name, order]
    found = [sample for sample in mine if sample is not None]
    off, floor = samples["off", "cold"], samples[FLOOR, "floor"]
    decode = [s.decode_tokens_per_s for s in found if s.decode_tokens_per_s is not None]
    return Row(
        cached_size=cached_size,
        order=order,
        way=way.name,
        kind=way.kind,
        prompt_tokens=found[-1].prompt_tokens,
        cached_tokens=median(sample.cached_tokens for sample in found),
        ttft_ms=Spread.of([sample.ttft_ms for sample in found]),
        speedup=median(_ratios(off, mine)),
        above_floor=median(_ratios(mine, floor)),
        decode_tokens_per_s=Spread.of(decode) if decode else None,
        agreement=_agreement(mine, off) if order == "cold" and way.name != "off" else None,
        parts_ms=_median_parts([sample.parts_ms for sample in found]),
    )


def _ratios(upper: Sequence[Sample | None], lower: Sequence[Sample | None]) -> list[float]:
    """Of times to first token, round by round."""
    pairs = zip(upper, lower, strict=True)
    return [mine.ttft_ms / theirs.ttft_ms for mine, theirs in pairs if mine and theirs]


def _agreement(mine: Sequence[Sample | None], theirs: Sequence[Sample | None]) -> float | None:
    """Share of rounds whose first tokens are the same; None where they aren't known."""
    pairs = zip(mine, theirs, strict=True)
    known = [(a.first_token, b.first_token) for a, b in pairs if a and b]
    return mean(a == b for a, b in known) if all(a >= 0 for a, _ in known) else None


def _median_parts(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: median(each[name] for each in parts) for name in parts[0]}
