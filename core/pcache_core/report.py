"""What happened to each part of a prompt: reused, encoded or computed, and how long it took."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

Source = Literal["prefix", "memory", "disk", "remote", "encoded", "computed", "repaired"]

_COLOURS: dict[Source, str] = {
    "prefix": "#2e7d32",
    "memory": "#388e3c",
    "disk": "#00838f",
    "remote": "#1565c0",
    "encoded": "#ef6c00",
    "computed": "#9e9e9e",
    "repaired": "#8e24aa",
}


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """One segment of the prompt and where most of its tokens came from.

    repaired_tokens: how many of them were reused and then computed again.
    note: why a state that was there was not used; empty where there is nothing to say.
    """

    kind: str
    name: str | None
    text: str
    num_tokens: int
    source: Source
    repaired_tokens: int = 0
    note: str = ""


@dataclass(slots=True)
class Report:
    """One request.

    `prompt_tokens` counts every token of the prompt, a beginning-of-sequence token included, and
    is the sum of `cached_tokens` (served from a prefix or from states that were there before),
    `encoded_tokens` (modules encoded during this call) and `computed_tokens`. `repaired_tokens`
    counts those of the cached and encoded ones that were then computed again, `not_loaded_tokens`
    those of the computed ones whose state was there, but would have taken longer to load than they
    took to compute; the segments' `note` says how long. `shared_tokens` counts the cached and
    encoded ones whose keys and values other running requests use as well, and nobody has a copy of.

    reuse: the mode that ran; differs from the one asked for when `fallback_reason` says why.
    ttft_ms: from the call to the first token (or to the logits, for a prefill alone); holds
        `load_ms` (states fetched or encoded), `assemble_ms` (copied and moved into place),
        `prefill_ms` (the forward over the computed tokens) and `repair_ms` (the choice of tokens
        to repair and the forward over them; 0 where nothing had to be chosen, and one forward did
        both).
    """

    segments: tuple[SegmentReport, ...]
    prompt_tokens: int
    cached_tokens: int
    encoded_tokens: int
    computed_tokens: int
    reuse: str
    ttft_ms: float = 0.0
    load_ms: float = 0.0
    assemble_ms: float = 0.0
    prefill_ms: float = 0.0
    generated_tokens: int = 0
    fallback_reason: str | None = None
    repaired_tokens: int = 0
    repair_ms: float = 0.0
    not_loaded_tokens: int = 0
    shared_tokens: int = 0

    @property
    def cached_share(self) -> float:
        """Share of the prompt's tokens that were served from a prefix or from states."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def _summary(self) -> str:
        repaired, repair_ms = "", ""
        if self.repaired_tokens:
            repaired = f" ({self.repaired_tokens} repaired)"
            repair_ms = f", repair {self.repair_ms:.1f}"
        line = (
            f"{self.reuse}: {self.cached_tokens} of {self.prompt_tokens} tokens reused, "
            f"{self.encoded_tokens} encoded{repaired}, {self.computed_tokens} computed; "
            f"first token after {self.ttft_ms:.1f} ms (load {self.load_ms:.1f}, "
            f"assemble {self.assemble_ms:.1f}, prefill {self.prefill_ms:.1f}{repair_ms})"
        )
        notes = [
            f"{segment.name or segment.kind}: {segment.note}"
            for segment in self.segments
            if segment.note
        ]
        fallback = [f"fallback: {self.fallback_reason}"] if self.fallback_reason else []
        return "\n".join([line, *notes, *fallback])

    def _sources(self) -> list[Source]:
        present = {segment.source for segment in self.segments}
        return [source for source in _COLOURS if source in present]

    def __str__(self) -> str:
        """The prompt coloured by source where the terminal has colours, and a line of figures."""
        console = Console()
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip("\n")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        prompt = Text()
        for segment in self.segments:
            prompt.append(segment.text, style=_COLOURS[segment.source])
        table = Table("source", "kind", "name", "tokens", "repaired", box=None, pad_edge=False)
        for segment in self.segments:
            table.add_row(
                Text(segment.source, style=_COLOURS[segment.source]),
                segment.kind,
                Text(segment.name or ""),
                str(segment.num_tokens),
                str(segment.repaired_tokens or ""),
            )
        yield prompt
        yield table
        yield Text(self._summary())

    def _repr_html_(self) -> str:
        """The prompt coloured by source, for notebooks; readable on dark and light pages."""
        spans = "".join(
            f'<span title="{html.escape(_title(segment), quote=True)}" style="border-bottom:2px '
            f'solid {_COLOURS[segment.source]};background:{_COLOURS[segment.source]}26">'
            f"{html.escape(segment.text)}</span>"
            for segment in self.segments
        )
        legend = " ".join(
            f'<span style="border-left:0.8em solid {_COLOURS[source]};padding-left:0.3em;'
            f'margin-right:1em">{source}</span>'
            for source in self._sources()
        )
        return (
            '<div style="font-family:monospace;line-height:1.6">'
            f'<div style="white-space:pre-wrap">{spans}</div>'
            f'<div style="margin-top:0.5em">{legend}</div>'
            f'<div style="white-space:pre-wrap">{html.escape(self._summary())}</div></div>'
        )


def _title(segment: SegmentReport) -> str:
    name = f" {segment.name}" if segment.name else ""
    repaired = f", {segment.repaired_tokens} repaired" if segment.repaired_tokens else ""
    note = f"; {segment.note}" if segment.note else ""
    return f"{segment.kind}{name}: {segment.num_tokens} tokens, {segment.source}{repaired}{note}"


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """What `engine.encode` did.

    texts: how many were given; `encoded` were computed now, `kept` of those are still in the store
    (its budget may be too small for all), `already_stored` were there before,
    `too_short` have fewer tokens than a module needs and are computed in line when they occur.
    tokens: tokens encoded now. seconds: wall time.
    reason: why this model can't have states ahead of time; None where it can.
    """

    texts: int
    encoded: int
    kept: int
    already_stored: int
    too_short: int
    tokens: int
    seconds: float
    reason: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Encoding speed; 0 when nothing was encoded."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        if self.reason is not None:
            return f"nothing encoded: {self.reason}"
        return (
            f"{self.encoded} of {self.texts} texts encoded ({self.tokens} tokens in "
            f"{self.seconds:.1f} s, {self.tokens_per_second:.0f} tokens/s), "
            f"{self.kept} of them kept, {self.already_stored} already stored, "
            f"{self.too_short} too short to store"
        )
