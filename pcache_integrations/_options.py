"""What a caller may set, for a language model object and for one call."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from pcache_core.errors import OptionError
from pcache_core.params import ReuseMode, SamplingParams, check_reuse

SAMPLING = tuple(field.name for field in fields(SamplingParams))


def check_names(given: Collection[str], known: Collection[str], place: str) -> None:
    """Refuse names that nothing would read. Raises: OptionError."""
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise OptionError(f"{place} doesn't know the option {name!r}; {remedy}")


def call_options(
    defaults: Mapping[str, Any], given: Mapping[str, Any], place: str
) -> tuple[SamplingParams, ReuseMode]:
    """One call's options: what is given for it, else the object's own.

    Names with `cache` in them are other providers' hints about what to cache. What can be reused
    is found without them, so they are accepted and have no effect.

    Raises: OptionError: an unknown name; a value out of range.
    """
    meant = {name: value for name, value in given.items() if "cache" not in name.lower()}
    check_names(meant, (*SAMPLING, "reuse"), place)
    chosen = {**defaults, **{name: value for name, value in meant.items() if value is not None}}
    reuse = check_reuse(chosen.pop("reuse"))
    chosen["stop"] = chosen["stop"] or ()
    return SamplingParams(**chosen), reuse
