"""A picture as HTML for notebooks.

Styles stand in the elements, since front ends drop style sheets, and text has the page's own
colour, since no page says whether it is dark. Colours are under text only as thin tints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from pcache_core.picture.fold import Excerpt, Gap, fold
from pcache_core.picture.model import SHARE_MEANS, Picture, Time
from pcache_core.picture.palette import LOOKS, ON_COLOUR, Source

TINT_ALPHA = "26"
"""Hexadecimal opacity of the colour behind text: 15%."""
QUIET_OPACITY = 0.8
"""Of text that matters less."""
_SHADES = (0.9, 0.65, 0.45, 0.3, 0.15)
_LINE = "rgba(128,128,128,.4)"
_CARD = (
    "color:inherit;font:14px/1.5 system-ui,-apple-system,'Segoe UI',sans-serif;max-width:64em;"
    f"border:1px solid {_LINE};border-radius:10px;padding:14px 18px;margin:4px 0;"
    "box-sizing:border-box;overflow-wrap:anywhere;text-align:left"
)
_TEXT = (
    "white-space:pre-wrap;font:13px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;"
    f"margin:12px 0;padding:12px 0;border:solid {_LINE};border-width:1px 0"
)
_CHIP = (
    f"color:{ON_COLOUR};border-radius:4px;padding:1px 6px;margin:0 5px 0 2px;max-width:100%;"
    "font:11px/1.4 system-ui,sans-serif;white-space:nowrap;user-select:none;box-sizing:border-box;"
    "display:inline-block;vertical-align:middle;overflow:hidden;text-overflow:ellipsis;background:"
)
_GAUGE = (
    f"display:inline-block;vertical-align:middle;width:72px;height:8px;border:1px solid {_LINE};"
    "border-radius:4px;overflow:hidden;margin-right:4px"
)
_BAR = "display:flex;gap:1px;border-radius:4px;overflow:hidden;height:"
_LEGEND = "display:flex;flex-wrap:wrap;gap:2px 16px;font-size:12px;margin-top:6px"


def draw(picture: Picture) -> str:
    """Return a fragment of HTML: nothing of the prompt in it is markup, and it is never long."""
    folded = fold(picture.runs)
    parts = (_heading(picture), _map(folded), _legend(folded), _prompt(folded), _times(picture))
    label = escape(picture.label, quote=True)
    notes = "".join(_notes(picture))
    return f'<div role="group" aria-label="{label}" style="{_CARD}">{"".join(parts)}{notes}</div>'


def _heading(picture: Picture) -> str:
    mode = f"border:1px solid {_LINE};border-radius:99px;padding:0 9px;font-size:12px"
    return (
        '<div style="display:flex;flex-wrap:wrap;align-items:baseline;gap:2px 12px">'
        f'<b style="font-size:17px">{escape(picture.headline)}</b> '
        f'<span style="opacity:{QUIET_OPACITY}">{escape(picture.details)}</span> '
        f'<span style="{mode}" title="reuse mode">{escape(picture.reuse)}</span></div>'
    )


def _map(folded: Sequence[Excerpt | Gap]) -> str:
    """Draw the whole prompt as a bar: a cell a run, as wide as it has tokens."""
    cells = []
    for part in folded:
        if isinstance(part, Gap):
            cells += [_cell(source, count, 0) for source, count in part.num_tokens.items()]
        else:
            cells.append(_cell(part.run.source, part.run.num_tokens, part.run.repaired_tokens))
    return f'<div aria-hidden="true" style="{_BAR}16px;margin-top:10px">{"".join(cells)}</div>'


def _cell(source: Source, num_tokens: int, repaired_tokens: int) -> str:
    """Filled from below by the share that was repaired."""
    colour, again = LOOKS[source].colour, LOOKS["repaired"].colour
    fill = colour
    if repaired_tokens and source != "repaired":
        share = f"{100 * repaired_tokens / num_tokens:.0f}%"
        fill = f"linear-gradient(to top,{again} {share},{colour} {share})"
    return f'<span style="flex:{num_tokens} 0 0;background:{fill}"></span>'


def _legend(folded: Sequence[Excerpt | Gap]) -> str:
    present: set[Source] = set()
    for part in folded:
        if isinstance(part, Gap):
            present.update(part.num_tokens)
        else:
            present |= {part.run.source} | ({"repaired"} if part.run.repaired_tokens else set())
    entries = " ".join(
        f'<span><b style="{_CHIP}{look.colour}">{look.symbol} {source}</b> {look.meaning}</span>'
        for source, look in LOOKS.items()
        if source in present
    )
    if any(isinstance(part, Excerpt) and part.run.share is not None for part in folded):
        entries += f" <span>{_gauge(1)} {SHARE_MEANS}</span>"
    return f'<div style="{_LEGEND}">{entries}</div>'


def _prompt(folded: Sequence[Excerpt | Gap]) -> str:
    drawn = (_gap(part) if isinstance(part, Gap) else _excerpt(part) for part in folded)
    return f'<div style="{_TEXT}">{"".join(drawn)}</div>'


def _gap(gap: Gap) -> str:
    return f'<div style="text-align:center"><i style="opacity:{QUIET_OPACITY}">… {gap} …</i></div>'


def _excerpt(excerpt: Excerpt) -> str:
    """Draw an excerpt; its chip stands where its first line with text begins."""
    run, look = excerpt.run, LOOKS[excerpt.run.source]
    style = (
        f"color:inherit;background:{look.colour}{TINT_ALPHA};border-bottom:2px solid {look.colour};"
        "unicode-bidi:isolate;border-radius:3px;padding:1px 0"
    )
    title = f'title="{escape(run.title, quote=True)}"'
    mark = f'<mark style="{style}" {title}>'
    if excerpt.is_blank:
        return f"{mark}{escape(excerpt.head)}</mark>"
    text = excerpt.head.lstrip("\n")
    line_breaks = len(excerpt.head) - len(text)
    above = f"{mark}{excerpt.head[:line_breaks]}</mark>" if line_breaks else ""
    cut = ""
    if excerpt.left_out:
        cut = (
            f'<i style="opacity:{QUIET_OPACITY};user-select:none"> … {excerpt.left_out:,} '
            "characters are not shown … </i>"
        )
    again = f" {LOOKS['repaired'].symbol} {run.repaired_tokens:,}" if run.repaired_tokens else ""
    label = escape(f"{look.symbol} {run.label} · {run.num_tokens:,}{again}")
    return (
        f'{above}<b style="{_CHIP}{look.colour}" {title}>{label} </b>{_gauge(run.share)}'
        f"{mark}{escape(text)}{cut}{escape(excerpt.tail)}</mark>"
    )


def _gauge(share: float | None) -> str:
    """Return a document's share of the question's attention, as a bar and in figures."""
    if share is None:
        return ""
    percent = f"{100 * share:.0f}%"
    bar = f'<span style="display:block;height:100%;width:{percent};background:currentColor"></span>'
    style = (
        f"font:11px/1.4 system-ui,sans-serif;opacity:{QUIET_OPACITY};margin-right:6px;"
        "user-select:none"
    )
    return (
        f'<span style="{style}" title="{SHARE_MEANS}">'
        f'<span aria-hidden="true" style="{_GAUGE}">{bar}</span>{percent} </span>'
    )


def _times(picture: Picture) -> str:
    """Draw how the time to the first token was spent, in shades of the text's colour."""
    times = list(zip(picture.all_times, _SHADES, strict=False))
    if not times:
        return ""
    cells = "".join(
        f'<span style="flex:{time.ms:.3f} 0 0;background:currentColor;opacity:{shade}"></span>'
        for time, shade in times
    )
    entries = " ".join(_time(time, shade) for time, shade in times)
    return (
        f"<div>first token after <b>{picture.ttft_ms:.1f} ms</b></div>"
        f'<div aria-hidden="true" style="{_BAR}8px;margin-top:4px">{cells}</div>'
        f'<div style="{_LEGEND}">{entries}</div>'
    )


def _time(time: Time, shade: float) -> str:
    swatch = f"background:currentColor;opacity:{shade};border-radius:2px;margin-right:5px"
    box = f'<span style="display:inline-block;width:10px;height:10px;{swatch}"></span>'
    return f"<span>{box}{escape(time.name)} {time.ms:.1f} ms</span>"


def _notes(picture: Picture) -> Iterator[str]:
    if picture.fallback is not None:
        colour = LOOKS["encoded"].colour
        style = (
            f"border-left:4px solid {colour};background:{colour}{TINT_ALPHA};border-radius:4px;"
            "padding:6px 10px;margin-top:10px"
        )
        yield f'<div style="{style}"><b>fallback:</b> {escape(picture.fallback)}</div>'
