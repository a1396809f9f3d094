"""Dropping what was precomputed: the inverse of `precompute`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pcache_core.errors import PromptError
from pcache_core.library import ModuleLibrary
from pcache_core.prompt import Segment


@dataclass(frozen=True, slots=True)
class ForgetReport:
    """What `engine.forget` did.

    texts: how many different ones were given. states: how many states of them were dropped; a text
    has one for every opening it was encoded behind. freed_bytes: by how much the store shrank, all
    tiers together; what a server holds is not counted.
    """

    texts: int
    states: int
    freed_bytes: int


def forget(library: ModuleLibrary, texts: Iterable[str]) -> ForgetReport:
    """Drop the states of texts; see `PromptCacheEngine.forget`."""
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise PromptError(f"forget takes a list of texts, got {type(texts).__name__}")
    documents = {Segment(text, "document") for text in texts if text}
    before = library.nbytes
    token_ids = {tuple(library.lm.text.ids(document)) for document in documents}
    dropped = library.drop(token_ids - {()})
    return ForgetReport(len(documents), dropped, max(0, before - library.nbytes))
