"""Whatever is read, laid out and resolved: a tree comes out, or a PMLError, and nothing else."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, seed, settings

from pcache_core.pml import Layout, PMLError, parse_prompt, parse_schema, place, resolve
from pml_documents import documents
from pml_words import chat, tokens

_BATCH = 2000
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


def settings_for(max_examples: int) -> settings:
    """Two seconds a document, none kept: failures are printed with their document."""
    return settings(
        max_examples=max_examples,
        deadline=2000,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


@settings_for(1000)
@given(documents())
def test_only_a_pml_error_comes_out(document: str | bytes) -> None:
    run(document)


def fuzz(num_documents: int) -> None:
    """The same with more documents: `python tests/pml/test_fuzz.py 100000`."""
    outcomes: Counter[str] = Counter()
    for batch in range(-(-num_documents // _BATCH)):

        @seed(batch)
        @settings_for(_BATCH)
        @given(documents())
        def check(document: str | bytes) -> None:
            outcomes[run(document)] += 1

        check()
        megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f"{outcomes.total()} documents, {megabytes} MB at most, {dict(outcomes)}", flush=True)


if __name__ == "__main__":
    fuzz(int(sys.argv[1]))
