"""Divergence and time to first token against how many reused tokens are computed again."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pcache_core.errors import OptionError
from pcache_core.evaluation.run import Way
from pcache_core.evaluation.table import Evaluation, Row
from pcache_core.params import REPAIR

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BUDGETS = (8, 16, 32, 64, 128, 256)
_FORMATS = (".png", ".svg")


def sweep() -> tuple[Way, ...]:
    """Repairs of growing numbers of tokens."""
    return tuple(Way(_name(budget), "balanced", budget) for budget in _BUDGETS)


def check_plot(file: Path) -> None:
    """See that `plot` will be able to write, before anything is measured.

    Raises: OptionError: another format, no such folder, matplotlib is not installed.
    """
    if file.suffix.lower() not in _FORMATS:
        raise OptionError(f"curve {str(file)!r} must end in {' or '.join(_FORMATS)}")
    if not file.parent.is_dir():
        raise OptionError(f"curve {str(file)!r} has no folder to go to; make {file.parent} first")
    if find_spec("matplotlib") is None:
        raise OptionError("a curve needs matplotlib: pip install 'pcache-integrations[eval]'")


def plot(evaluation: Evaluation, file: Path) -> None:
    """Draw the rows of `sweep`, and those of the modes among them, into a file.

    Raises: OptionError: as `check_plot`, or the file can't be written.
    """
    check_plot(file)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "pcache", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 6), layout="constrained")
        divergence, ttft = figure.subplots(2, sharex=True)
        rows = {row.reuse: row for row in evaluation.rows}
        _draw(divergence, rows, {name: row.kl_mean for name, row in rows.items()})
        _draw(ttft, rows, {name: row.ttft_p50_ms for name, row in rows.items()})
        divergence.set_ylabel("divergence from off, nats")
        ttft.set_ylabel("TTFT p50, ms")
        ttft.set_ylim(bottom=0)
        ttft.set_xlabel("tokens computed again")
        divergence.legend(fontsize="small")
        asked = evaluation.questions
        figure.suptitle(f"{evaluation.model}, {len(asked.items)} questions of {asked.description}")
        undated = {"Date": None} if file.suffix.lower() == ".svg" else None
        try:
            figure.savefig(file, metadata=undated)
        except OSError as error:
            raise OptionError(f"curve {str(file)!r} can't be written ({error.strerror})") from None


def _draw(axes: Axes, rows: dict[str, Row], height: dict[str, float]) -> None:
    """A line over budgets, from `fast` on; a mark for each mode; a level for `off`."""
    axes.axhline(height["off"], color="grey", linestyle="dashed", label="off")
    names = _present(rows, ["fast", *map(_name, _BUDGETS)])
    counts = [rows[name].repaired_tokens for name in names]
    label = "what the question attends to"
    axes.plot(counts, [height[name] for name in names], marker=".", label=label)
    for name in _present(rows, ["fast", *REPAIR]):
        point = (rows[name].repaired_tokens, height[name])
        axes.plot(*point, marker="D", linestyle="none", color="black")
        axes.annotate(name, point, xytext=(6, -12), textcoords="offset points")
    axes.grid(alpha=0.3)


def _present(rows: dict[str, Row], names: Sequence[str]) -> list[str]:
    return [name for name in names if name in rows]


def _name(budget: int) -> str:
    return f"repair {budget}"
