"""Timed requests, their medians and ratios within each round, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from pcache_core import Prompt
from pcache_core.picture import shown

Order = Literal["cold", "same", "new", "floor"]
"""What is known of a prompt: nothing; its documents in this order; in another; all but its end."""

FLOOR = "forward, K/V in place"
_ORDERS: dict[Order, str] = {
    "cold": "nothing known",
    "same": "same order",
    "new": "new order",
    "floor": "the floor",
}
_HEADERS = (
    "documents\nknown in", "\nway", "tokens\nreused", "TTFT ms\np50", "\nmin – max",
    "times faster\nthan off", "times the\nfloor", "decode\ntokens/s",
)  # fmt: skip
_LEGEND = (
    "TTFT: time to first token. Every prompt asks another question. "
    "off runs through the attention function that all modes have, so no speed-up is owed to it. "
    "The floor: a bare forward of the question's tokens. Ratios are medians of each round's own."
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed request.

    decode_tokens_per_s: of the tokens after the first; None where there was only one.
    """

    ttft_ms: float
    prompt_tokens: int
    cached_tokens: int
    decode_tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """Something that answers prompts.

    orders: which of a round's prompts are timed; the first one is asked in any case, so that the
    others find their documents known. ask: returns None where it can't answer any more. reset:
    forgets what earlier rounds left.
    """

    name: str
    kind: Literal["ours", "floor", "peer"]
    orders: tuple[Order, ...]
    ask: Callable[[Prompt], Sample | None]
    reset: Callable[[], object] = lambda: None


Samples = dict[tuple[str, Order], list[Sample | None]]
"""Of each way and order, round by round; None where there was no answer."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and most of one value or more."""

    p50: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise them."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Row:
    """One way of asking, at one length, over all rounds.

    speedup: TTFT of `off` over this one's, the median of the rounds' ratios. above_floor: TTFT over
    that of the bare forward, likewise.
    """

    cached_size: int
    order: Order
    way: str
    kind: str
    prompt_tokens: int
    cached_tokens: float
    ttft_ms: Spread
    speedup: float
    above_floor: float
    decode_tokens_per_s: Spread | None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A finished benchmark; rich prints it as tables. notes: modes that did not run as asked."""

    model: str
    parameters: int
    kv_bytes_per_token: int
    options: Mapping[str, Any]
    environment: Mapping[str, str | int]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        asked = (f"{name} {value}" for name, value in self.options.items())
        model = f"{shown(self.model)}, {self.parameters / 1e9:.2f}B parameters"
        yield Text(f"{model}, {', '.join(asked)}")
        for size in self.options["sizes"]:
            rows = [row for row in self.rows if row.cached_size == size]
            yield Text(f"\n{size:,} tokens of documents, prompts of {rows[0].prompt_tokens:,}\n")
            yield _table(rows)
        facts = (f"{name} {value}" for name, value in self.environment.items())
        for note in ("", _LEGEND, *self.notes, ", ".join(facts)):
            yield Text(shown(note), style="dim")


def rows_of(cached_size: int, ways: Sequence[Way], samples: Samples) -> Iterator[Row]:
    """Yield a row for each way and order that answered at least once, cold ones first."""
    off, floor = samples["off", "cold"], samples[FLOOR, "floor"]
    for order in _ORDERS:
        for way in ways:
            mine = samples.get((way.name, order), [])
            found = [sample for sample in mine if sample is not None]
            if not found:
                continue
            decode = [s.decode_tokens_per_s for s in found if s.decode_tokens_per_s is not None]
            yield Row(
                cached_size,
                order,
                way.name,
                way.kind,
                prompt_tokens=found[-1].prompt_tokens,
                cached_tokens=median(sample.cached_tokens for sample in found),
                ttft_ms=Spread.of([sample.ttft_ms for sample in found]),
                speedup=_ratio(off, mine),
                above_floor=_ratio(mine, floor),
                decode_tokens_per_s=Spread.of(decode) if decode else None,
            )


def _ratio(upper: Sequence[Sample | None], lower: Sequence[Sample | None]) -> float:
    """Return the median of each round's ratio of times to first token."""
    pairs = zip(upper, lower, strict=True)
    return median(mine.ttft_ms / theirs.ttft_ms for mine, theirs in pairs if mine and theirs)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, header in enumerate(_HEADERS):
        table.add_column(header, justify="right" if number > 1 else "left", no_wrap=True)
    for before, row in zip((None, *rows), rows, strict=False):
        ttft, decode = row.ttft_ms, row.decode_tokens_per_s
        table.add_row(
            _ORDERS[row.order] if before is None or before.order != row.order else "",
            Text(row.way, style="bold" if row.kind == "ours" else ""),
            f"{row.cached_tokens:.0f}",
            _number(ttft.p50),
            f"{_number(ttft.min)} – {_number(ttft.max)}",
            _number(row.speedup),
            _number(row.above_floor),
            "–" if decode is None else _number(decode.p50),
        )
    return table


def _number(value: float) -> str:
    """Write three digits, or all before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
