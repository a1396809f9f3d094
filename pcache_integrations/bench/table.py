"""A benchmark as a table and the lines below it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from pcache_integrations.bench.figures import (
    Benchmark,
    Concurrency,
    Encoding,
    Line,
    Order,
    Row,
    Spread,
)

_ORDERS: dict[Order, str] = {
    "cold": "nothing known",
    "same": "documents known,\nsame order",
    "new": "documents known,\nnew order",
    "floor": "the floor",
}
_HEADERS = (
    "tokens\nreused", "TTFT ms\np50", "\nmin – max", "times faster\nthan off",
    "times the\nfloor", "decode\ntokens/s", "first token\nas off",
)  # fmt: skip
_LEGEND = (
    "TTFT: time to first token. Every prompt asks another question. "
    "off runs through the attention function that all modes have, so no speed-up is owed to it.",
    "The floor: a bare forward of the question's tokens. Ratios are medians of each round's own.",
)


class Report:
    """Prints a benchmark with rich."""

    def __init__(self, benchmark: Benchmark) -> None:
        self._benchmark = benchmark

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = self._benchmark
        yield Text(_headline(found))
        for size in dict.fromkeys(row.cached_size for row in found.rows):
            rows = [row for row in found.rows if row.cached_size == size]
            yield Text(f"\n{size:,} tokens of documents, prompts of {rows[0].prompt_tokens:,}\n")
            yield _table(rows)
        yield Text("")
        for line in _lines(found):
            yield Text(line)
        yield Text("")
        for note in (*_LEGEND, *found.notes):
            yield Text(note, style="dim")
        facts = (f"{name} {value}" for name, value in found.environment.items())
        yield Text(", ".join(facts), style="dim")


def _headline(found: Benchmark) -> str:
    options = found.options
    stored = found.stored_bytes_per_token
    kept = "" if stored is None else f", {stored:,.0f} as stored"
    return (
        f"{found.model}, {found.parameters / 1e9:.2f}B parameters, {options['documents']} "
        f"documents, {options['question_tokens']} tokens of question, {options['answer_tokens']} "
        f"of answer, tier {options['tier']}, {options['rounds']} rounds, seed {options['seed']}\n"
        f"{found.kv_bytes_per_token:,} bytes of keys and values per token{kept}"
    )


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("\n", no_wrap=True)
    table.add_column("\nway", no_wrap=True)
    for header in _HEADERS:
        table.add_column(header, justify="right", no_wrap=True)
    for order, label in _ORDERS.items():
        group = [row for row in rows if row.order == order]
        labels = label.split("\n") + [""] * len(group)
        for number, row in enumerate(group):
            is_last = number == len(group) - 1
            table.add_row(
                "\n".join(labels[number:]).rstrip() if is_last else labels[number],
                Text(row.way, style="bold" if row.kind == "ours" else ""),
                *_cells(row),
                end_section=is_last,
            )
    return table


def _cells(row: Row) -> list[str]:
    return [
        f"{row.cached_tokens:.0f}",
        _number(row.ttft_ms.p50),
        f"{_number(row.ttft_ms.min)} – {_number(row.ttft_ms.max)}",
        f"{row.speedup:.2f}" if row.speedup < 10 else f"{row.speedup:.1f}",
        f"{row.above_floor:.2f}" if row.above_floor < 10 else f"{row.above_floor:.1f}",
        "–" if row.decode_tokens_per_s is None else _number(row.decode_tokens_per_s.p50),
        "–" if row.agreement is None else f"{row.agreement:.0%}",
    ]


def _lines(found: Benchmark) -> Iterator[str]:
    yield from map(_encoding, found.encoding)
    yield from map(_concurrency, found.concurrency)
    yield from map(_growth, found.growth)
    yield from _among_others(found)
    for peer in found.peers:
        if peer.problem is not None:
            yield f"{peer.name}: {peer.problem}"
    versions = [peer.version for peer in found.peers if peer.version]
    if versions:
        yield f"peers: {', '.join(dict.fromkeys(versions))}"


def _encoding(found: Encoding) -> str:
    return (
        f"encoding {found.cached_size:,} tokens: {_spread(found.tokens_per_s)} tokens/s, "
        f"{found.share:.0%} of the model's best plain forward "
        f"({_spread(found.forward_tokens_per_s)} tokens/s, {found.forward_batch} documents padded "
        "to one length)"
    )


def _concurrency(found: Concurrency) -> str:
    memory = (
        f"; keys and values take {found.kv_bytes / 1e6:,.0f} MB at most, "
        f"{found.kv_bytes / found.separate_kv_bytes:.0%} of separate copies"
    )
    return (
        f"{found.requests} requests in fast over {found.cached_size:,} tokens: "
        f"{_spread(found.alone_tokens_per_s)} tokens/s one after another, "
        f"{_spread(found.at_once_tokens_per_s)} at once, {found.speedup:.1f} times as many{memory}"
    )


def _growth(line: Line) -> str:
    return (
        f"growth of TTFT, {line.way}: {line.us_per_token:.2f} µs a cached token, "
        f"{line.intercept_ms:.1f} ms at none, R² {line.r_squared:.4f}"
    )


def _among_others(found: Benchmark) -> Iterator[str]:
    """Whether the number of states in the store matters."""
    fast = {(row.cached_size, row.order): row for row in found.rows if row.way == "fast"}
    for row in found.rows:
        plain = fast.get((row.cached_size, row.order))
        if plain is not None and row.way.startswith("fast,"):
            yield (
                f"{row.way}, {_ORDERS[row.order].replace(chr(10), ' ')}, {row.cached_size:,} "
                f"tokens: {row.ttft_ms.p50 / plain.ttft_ms.p50:.2f} times the TTFT of fast"
            )


def _spread(spread: Spread) -> str:
    return f"{_number(spread.p50)} ({_number(spread.min)} – {_number(spread.max)})"


def _number(value: float) -> str:
    """Three or more digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
