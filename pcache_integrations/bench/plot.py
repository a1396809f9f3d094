"""TTFT against cached tokens, and where the time goes, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pcache_core import DependencyError, OptionError
from pcache_integrations.bench.figures import Benchmark, Row
from pcache_integrations.bench.ways import FLOOR

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMATS = (".png", ".svg")
# Okabe and Ito's colours, which most people can tell apart.
_OURS = {
    "off": "#777777",
    "exact": "#56b4e9",
    "fast": "#009e73",
    "balanced": "#0072b2",
    "high": "#5e3c99",
    FLOOR: "black",
}
_OTHERS = ("#d55e00", "#cc79a7", "#e69f00", "#882255")
_PARTS = {
    "look up and load": "#e69f00",
    "copy and rotate": "#56b4e9",
    "forward": "#009e73",
    "other": "#999999",
}
_ORDERS = {"cold": "", "same": "same order", "new": "new order", "floor": ""}
_STYLES = {"cold": "solid", "same": "dotted", "new": "solid", "floor": "dashed"}


@dataclass(frozen=True, slots=True)
class _Curve:
    """One line of the upper picture."""

    label: str
    colour: str
    style: str
    rows: tuple[Row, ...]

    @property
    def height(self) -> float:
        """Where it ends, to sort the legend as the lines lie."""
        return self.rows[-1].ttft_ms.p50


def check_plot(file: Path) -> None:
    """See that `plot` will be able to write, before anything is measured.

    Raises: OptionError: another format, no such folder. DependencyError: no matplotlib.
    """
    if file.suffix.lower() not in _FORMATS:
        raise OptionError(f"--plot {str(file)!r} must end in {' or '.join(_FORMATS)}")
    if not file.parent.is_dir():
        raise OptionError(f"--plot {str(file)!r} has no folder to go to; make {file.parent} first")
    if find_spec("matplotlib") is None:
        raise DependencyError("--plot needs matplotlib: pip install 'pcache-integrations[bench]'")


def plot(benchmark: Benchmark, file: Path) -> None:
    """Draw a benchmark into a file, on white, so that it is readable on dark pages too.

    Raises: OptionError, DependencyError: as `check_plot`, or the file can't be written.
    """
    check_plot(file)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "pcache", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(9, 7.5), layout="constrained", facecolor="white")
        above, below = figure.subplots(2, height_ratios=(5, 2))
        _draw_ttft(above, benchmark.rows)
        _draw_parts(below, benchmark.rows)
        about, options = benchmark.environment, benchmark.options
        figure.suptitle(
            f"{benchmark.model}, {about['dtype']} on {about['device']}, threads: "
            f"{about['threads']}, {options['documents']} documents, question of "
            f"{options['question_tokens']} tokens",
            fontsize="medium",
        )
        undated = {"Date": None} if file.suffix.lower() == ".svg" else None
        try:
            figure.savefig(file, metadata=undated, dpi=150)
        except OSError as error:
            raise OptionError(f"--plot {str(file)!r} can't be written ({error.strerror})") from None


def _draw_ttft(axes: Axes, rows: Sequence[Row]) -> None:
    """A line for each way and order, and at each point a bar from the least to the most."""
    for curve in sorted(_curves(rows), key=lambda curve: -curve.height):
        p50 = [row.ttft_ms.p50 for row in curve.rows]
        below = [row.ttft_ms.p50 - row.ttft_ms.min for row in curve.rows]
        above = [row.ttft_ms.max - row.ttft_ms.p50 for row in curve.rows]
        is_peer = curve.rows[0].kind == "peer"
        axes.errorbar(
            [row.cached_size for row in curve.rows],
            p50,
            yerr=(below, above),
            label=curve.label,
            color=curve.colour,
            linestyle=curve.style,
            linewidth=1.2 if is_peer else 2,
            marker="." if is_peer else "o",
            markersize=5,
            elinewidth=0.8,
        )
    sizes = sorted({row.cached_size for row in rows})
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="tokens of documents in the prompt", ylabel="time to first token, ms")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3, which="both")
    _legend(axes)


def _curves(rows: Sequence[Row]) -> list[_Curve]:
    """Those that tell something: in a new order a prefix is as good as nothing, and so on."""
    ways = list(dict.fromkeys(row.way for row in rows))
    asked = {(row.way, row.order) for row in rows}
    peers = dict.fromkeys(row.way for row in rows if row.kind == "peer")
    colours = {**_OURS, **dict(zip(peers, _OTHERS, strict=False))}
    curves = []
    for way in ways:
        for order, style in _STYLES.items():
            is_said = (order == "cold" and (way, "new") in asked) or (
                way not in peers and order == ("new" if way == "exact" else "same")
            )
            if (way, order) not in asked or way not in colours or is_said:
                continue
            label = ", ".join(filter(None, (way, _ORDERS[order])))
            found = tuple(row for row in rows if (row.way, row.order) == (way, order))
            curves.append(_Curve(label, colours[way], style, found))
    return curves


def _draw_parts(axes: Axes, rows: Sequence[Row]) -> None:
    """Where the time to first token of `fast` goes, a bar for each size."""
    fast = [row for row in rows if row.way == "fast"]
    shown = [row for row in fast if row.order == "new"] or fast
    names = [f"{row.cached_size:,}" for row in shown]
    left = [0.0] * len(shown)
    for part, colour in _PARTS.items():
        widths = [row.parts_ms[part] for row in shown]
        axes.barh(names, widths, left=left, label=part, color=colour)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set(xlabel="time to first token of fast, ms", ylabel="tokens of documents")
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Beside the picture, where it hides nothing."""
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
