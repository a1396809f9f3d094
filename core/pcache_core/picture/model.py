"""What a picture shows: stretches of a prompt and figures, before either has a shape."""

from __future__ import annotations

from dataclasses import dataclass

from pcache_core.picture.palette import Source

SHARE_MEANS = "of the question's attention to the documents"


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of the prompt that is drawn as one.

    label: what it is called. title: one line for each of its segments, with all there is to say.
    share: a document's share of the question's attention to all documents; None if unknown.
    """

    label: str
    source: Source
    text: str
    num_tokens: int
    repaired_tokens: int
    title: str
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Time:
    """A part of the time to the first token."""

    name: str
    ms: float


@dataclass(frozen=True, slots=True)
class Picture:
    """A report as it is drawn.

    headline: what was reused. details: of the other tokens. reuse: the mode that ran.
    times: one after the other, together not more than `ttft_ms`.
    fallback: why another mode ran; None if none did.
    """

    headline: str
    details: str
    reuse: str
    runs: tuple[Run, ...]
    ttft_ms: float
    times: tuple[Time, ...]
    fallback: str | None

    @property
    def all_times(self) -> tuple[Time, ...]:
        """The parts that took any time, and what none of them accounts for."""
        other = Time("other", max(0.0, self.ttft_ms - sum(time.ms for time in self.times)))
        return tuple(time for time in (*self.times, other) if time.ms >= self.ttft_ms / 1000 > 0)

    @property
    def label(self) -> str:
        """The picture in a sentence."""
        return f"{self.reuse}: {self.headline}, {self.details}"


_SHOWN_CONTROLS = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd"),
    **dict.fromkeys((0x2028, 0x2029, *range(0xD800, 0xE000)), "\ufffd"),
}


def shown(text: str) -> str:
    """Make control characters visible, so that none reaches a terminal or a page.

    Those that reverse what follows them are among these, and what no encoding has.
    """
    return text.replace("\r\n", "\n").translate(_SHOWN_CONTROLS)
