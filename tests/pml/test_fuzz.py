"""Whatever is read, laid out and resolved: a tree comes out, or a PMLError, and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pcache_core.pml import Layout, PMLError, parse_prompt, parse_schema, place, resolve
from pml_documents import documents
from pml_words import chat, tokens

OPENING = place(
    parse_schema("<schema name='a'><module name='b'><slot name='a'/></module></schema>"),
    tokens,
    marks=chat,
)


def outcome_of(call: Callable[[], Any]) -> Any:
    """The result, or the error; any other error is the test's."""
    try:
        return call()
    except PMLError as error:
        return error


def run(document: str | bytes) -> str:
    """What became of a document, read as a schema and as a prompt."""
    layout = outcome_of(lambda: place(parse_schema(document), tokens, marks=chat))
    fits = layout if isinstance(layout, Layout) else OPENING
    resolution = outcome_of(lambda: resolve(fits, parse_prompt(document), positions="compact"))
    for result in (layout, resolution):
        if isinstance(result, PMLError):
            assert result.file == "<string>"
            assert "not PML:" not in str(result)  # libxml2's own words: our reading has a hole
    return f"{type(layout).__name__} {type(resolution).__name__}"


@settings(max_examples=1500, deadline=2000, suppress_health_check=list(HealthCheck), database=None)
@given(documents())
def test_only_a_pml_error_comes_out(document: str | bytes) -> None:
    run(document)


def fuzz(max_examples: int) -> None:
    """The same with more examples: `python tests/pml/test_fuzz.py 100000`."""
    seen: dict[str, int] = {}

    @settings(
        max_examples=max_examples,
        deadline=2000,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        document = data.draw(documents())
        outcome = run(document)
        seen[outcome] = seen.get(outcome, 0) + 1

    check()
    print(seen)  # noqa: T201


if __name__ == "__main__":
    fuzz(int(sys.argv[1]))
