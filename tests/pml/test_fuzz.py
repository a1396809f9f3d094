"""Whatever is read, laid out and resolved: a result comes out, or a PMLError, and nothing else."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pcache_core.pml import PMLError, SchemaLayout, parse_prompt, parse_schema, place, resolve
from pml_documents import random_document
from pml_words import chat, tokens

FILES = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*/**/*.xml"))]
OPENING = place(
    parse_schema(
        "<schema name='a'><module name='a'/><union><module name='b'><param name='c' len='2'/>"
        "</module></union><slot name='docs' max-tokens='4'/></schema>"
    ),
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
    fits = layout if isinstance(layout, SchemaLayout) else OPENING
    resolution = outcome_of(lambda: resolve(fits, parse_prompt(document), positions="compact"))
    for result in (layout, resolution):
        if isinstance(result, PMLError):
            assert result.file == "<string>"
            assert "not PML:" not in str(result)  # libxml2's own words: our reading has a hole
    return f"{type(layout).__name__}, {type(resolution).__name__}"


@settings(
    max_examples=2000,
    deadline=5000,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(st.randoms(use_true_random=False))
def test_only_a_pml_error_comes_out(random: Random) -> None:
    run(random_document(random, FILES))


def fuzz(num_documents: int) -> None:
    """Any number of documents, in a row: `python tests/pml/test_fuzz.py 100000`."""
    outcomes: Counter[str] = Counter()
    slowest_s = 0.0
    for number in range(num_documents):
        document = random_document(Random(number), FILES)
        started = time.perf_counter()
        try:
            outcomes[run(document)] += 1
        except BaseException:
            print(f"document {number}: {document!r}")
            raise
        slowest_s = max(slowest_s, time.perf_counter() - started)
        if (number + 1) % 10_000 == 0:
            megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(f"{number + 1} documents, {megabytes} MB, slowest {slowest_s:.2f} s", flush=True)
    print(dict(outcomes))


if __name__ == "__main__":
    fuzz(int(sys.argv[1]))
