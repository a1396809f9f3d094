"""A picture as rich renderables for terminals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from pcache_core.picture.fold import Excerpt, Gap, fold
from pcache_core.picture.model import SHARE_MEANS, Picture, Run
from pcache_core.picture.palette import LOOKS, ON_COLOUR, Source

_SHADES = "█▓▒░·"
_LONGEST_BAR = 100
_GAUGE = 10


def draw(picture: Picture, console: Console, options: ConsoleOptions) -> RenderResult:
    """Text in the terminal's own colour beside coloured bars, so that any theme can show it."""
    folded = fold(picture.runs)
    width = min(options.max_width, _LONGEST_BAR)
    if console.color_system is not None:
        yield _map(folded, width)
    for part in folded:
        if isinstance(part, Gap):
            yield Text(f"… {part} …", style="italic")
        elif not part.is_blank:
            yield from _excerpt(part, console, options.max_width)
    yield Text(f"\n{picture.label}", style="bold")
    if any(run.share is not None for run in picture.runs):
        yield Text(f"bars and percentages: shares {SHARE_MEANS}")
    yield from _times(picture, width)
    if picture.fallback is not None:
        yield Text(f"fallback: {picture.fallback}", style="bold")


def _map(folded: Sequence[Excerpt | Gap], width: int) -> Text:
    """Draw the whole prompt as a bar, each run as wide as it has tokens."""
    cells: list[tuple[Source, int]] = []
    for part in folded:
        if isinstance(part, Gap):
            cells += part.num_tokens.items()
        else:
            cells.append((part.run.source, part.run.num_tokens))
    columns = _columns([count for _, count in cells], width)
    bar = Text(no_wrap=True)
    for (source, _), count in zip(cells, columns, strict=True):
        bar.append("█" * count, style=LOOKS[source].colour)
    return bar


def _columns(weights: Sequence[float], width: int) -> Iterator[int]:
    """Whole columns for each weight, `width` together."""
    total, done, before = sum(weights) or 1, 0.0, 0
    for weight in weights:
        done += weight
        stop = round(width * done / total)
        yield stop - before
        before = stop


def _excerpt(excerpt: Excerpt, console: Console, width: int) -> Iterator[Text]:
    colour = LOOKS[excerpt.run.source].colour
    yield _chip(excerpt.run)
    text = Text(excerpt.head.strip("\n"))
    if excerpt.left_out:
        text.append(f" … {excerpt.left_out:,} characters are not shown … ", style="italic")
        text.append(excerpt.tail.rstrip("\n"))
    for line in text.wrap(console, max(1, width - 2)):
        yield Text.assemble(("▎ ", colour), line)


def _chip(run: Run) -> Text:
    look = LOOKS[run.source]
    repaired = f", {run.repaired_tokens:,} of them repaired" if run.repaired_tokens else ""
    plural = "" if run.num_tokens == 1 else "s"
    return Text.assemble(
        (f" {look.symbol} {run.source} ", f"{ON_COLOUR} on {look.colour}"),
        "" if run.share is None else _gauge(run.share),
        (f" {run.label}", "bold"),
        f"  {run.num_tokens:,} token{plural}{repaired}",
        no_wrap=True,
        overflow="ellipsis",
    )


def _gauge(share: float) -> str:
    filled = round(_GAUGE * share)
    return f" {'█' * filled}{'░' * (_GAUGE - filled)} {share:4.0%}"


def _times(picture: Picture, width: int) -> Iterator[Text]:
    times = list(zip(picture.all_times, _SHADES, strict=False))
    if not times:
        return
    yield Text(f"first token after {picture.ttft_ms:.1f} ms")
    columns = _columns([time.ms for time, _ in times], width)
    yield Text("".join(shade * n for (_, shade), n in zip(times, columns, strict=True)))
    yield Text("  ".join(f"{shade} {time.name} {time.ms:.1f}" for time, shade in times))
