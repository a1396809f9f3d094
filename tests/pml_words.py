"""Tokens that can be read: words, runs of white space, signs."""

from __future__ import annotations

import re

from pcache_core.pml import Mark, RoleName

_VOCABULARY: dict[str, int] = {}


def tokens(text: str) -> list[int]:
    """One id for each word, each run of white space and each other character."""
    words = re.findall(r"\w+|\s+|[^\w\s]", text)
    return [_VOCABULARY.setdefault(word, len(_VOCABULARY)) for word in words]


def chat(before: RoleName | None, after: RoleName | None) -> Mark | None:
    """A template in the style of ChatML: closes a message, opens the next; no system but first."""
    if after == "system" and before is not None:
        return None
    text = ("" if before is None else "<end>\n") + f"<{after or 'answer'}>\n"
    return Mark(text, tuple(tokens(text)))
