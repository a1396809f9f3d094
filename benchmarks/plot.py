"""Time to first token against cached tokens, as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from pcache_integrations.bench.results import FLOOR, Benchmark, Order, Row

# Okabe and Ito's colours, which most people can tell apart.
OURS = {
    "off": "#777777",
    "exact": "#56b4e9",
    "fast": "#009e73",
    "balanced": "#0072b2",
    "high": "#5e3c99",
    FLOOR: "black",
}
OTHERS = ("#d55e00", "#cc79a7", "#e69f00", "#882255")
ORDERS: dict[Order, str] = {"cold": "", "same": "same order", "new": "new order", "floor": ""}
STYLES = {"cold": "solid", "same": "dotted", "new": "solid", "floor": "dashed"}


def plot(benchmark: Benchmark, file: Path) -> None:
    """Draw a line for each way and order, with bars from the least to the most, on white."""
    with rc_context({"svg.hashsalt": "pcache", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(9, 5.5), layout="constrained", facecolor="white")
        axes = figure.subplots()
        for label, colour, rows in sorted(curves(benchmark.rows), key=height, reverse=True):
            p50 = [row.ttft_ms.p50 for row in rows]
            below = [row.ttft_ms.p50 - row.ttft_ms.min for row in rows]
            above = [row.ttft_ms.max - row.ttft_ms.p50 for row in rows]
            axes.errorbar(
                [row.cached_size for row in rows],
                p50,
                yerr=(below, above),
                label=label,
                color=colour,
                linestyle=STYLES[rows[0].order],
                linewidth=1.2 if rows[0].kind == "peer" else 2,
                marker="." if rows[0].kind == "peer" else "o",
                markersize=5,
                elinewidth=0.8,
            )
        sizes = sorted({row.cached_size for row in benchmark.rows})
        axes.set(xscale="log", yscale="log")
        axes.set(xlabel="tokens of documents in the prompt", ylabel="time to first token, ms")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        about, options = benchmark.environment, benchmark.options
        figure.suptitle(
            f"{benchmark.model}, {about['dtype']} on {about['device']}, threads: "
            f"{about['threads']}, {options['documents']} documents, question of "
            f"{options['question_tokens']} tokens",
            fontsize="medium",
        )
        undated = {"Date": None} if file.suffix.lower() == ".svg" else None
        figure.savefig(file, metadata=undated, dpi=150)


def curves(rows: Sequence[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """Yield label, colour and rows of what tells something.

    In a new order, a prefix is as good as nothing; a peer's first prompt is like its new ones.
    """
    peers = dict.fromkeys(row.way for row in rows if row.kind == "peer")
    colours = OURS | dict(zip(peers, OTHERS, strict=False))
    asked = dict.fromkeys((row.way, row.order) for row in rows)
    for way, order in asked:
        as_cold = order == "cold" and (way, "new") in asked
        as_other = way not in peers and order == ("new" if way == "exact" else "same")
        if not as_cold and not as_other:
            label = ", ".join(filter(None, (way, ORDERS[order])))
            found = [row for row in rows if (row.way, row.order) == (way, order)]
            yield label, colours[way], found


def height(curve: tuple[str, str, list[Row]]) -> float:
    """Return where it ends: the legend is sorted as the lines lie."""
    return curve[2][-1].ttft_ms.p50
