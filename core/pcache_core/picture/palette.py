"""Where tokens came from, and how each origin looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Source = Literal["prefix", "memory", "disk", "remote", "encoded", "computed", "repaired"]


@dataclass(frozen=True, slots=True)
class Look:
    """How one source is drawn. symbol: says the same without colour. meaning: for the legend."""

    colour: str
    symbol: str
    meaning: str


LOOKS: dict[Source, Look] = {
    "prefix": Look("#6a7e07", "»", "left by an earlier prompt"),
    "memory": Look("#01874c", "●", "state found in memory"),
    "disk": Look("#00828d", "◆", "state read from disk"),
    "remote": Look("#2f72df", "▲", "state fetched from a server"),
    "encoded": Look("#b55e06", "+", "encoded now, kept for the next prompt"),
    "computed": Look("#737582", "○", "computed now"),
    "repaired": Look("#a84ccc", "◐", "computed again, seeing all before it"),
}
"""All of one luminance, at which white text on them, and they on white and on black, have a
contrast above 4.5 (WCAG 2.2, AA): one palette for dark and light pages."""

ON_COLOUR = "#ffffff"
"""Text on any of the colours."""
