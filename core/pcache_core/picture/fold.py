"""Long prompts made short enough to look at: runs left out, and texts cut in their middle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pcache_core.picture.model import Run, shown
from pcache_core.picture.palette import Source

MAX_CHARS = 6_000
"""Of all texts together: a page or two."""
_MOST_CHARS = 1_500
"""Of one text."""
_FIRST_RUNS, _LAST_RUNS = 40, 24
_LEAST_CHARS = 60


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A run and what is shown of its text: all of it, or its beginning and its end.

    left_out: how many characters are missing between `head` and `tail`.
    """

    run: Run
    head: str
    left_out: int = 0
    tail: str = ""

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing to see."""
        return not self.left_out and not self.head.strip()


@dataclass(frozen=True, slots=True)
class Gap:
    """Runs that are not shown. num_tokens: theirs, by source."""

    runs: int
    num_tokens: dict[Source, int]

    def __str__(self) -> str:
        tokens = ", ".join(f"{count:,} {source}" for source, count in self.num_tokens.items())
        return f"{self.runs:,} parts are not shown: tokens {tokens}"


def fold(runs: Sequence[Run]) -> list[Excerpt | Gap]:
    """At most `MAX_CHARS` of the prompt, from its beginning and its end; short runs whole."""
    hidden = runs[_FIRST_RUNS : len(runs) - _LAST_RUNS]
    if len(hidden) < 2:
        return list(_excerpts(runs, MAX_CHARS))
    counts: Counter[Source] = Counter()
    for run in hidden:
        counts[run.source] += run.num_tokens
    kept = [*runs[:_FIRST_RUNS], *runs[-_LAST_RUNS:]]
    folded: list[Excerpt | Gap] = list(_excerpts(kept, MAX_CHARS))
    folded.insert(_FIRST_RUNS, Gap(len(hidden), dict(counts)))
    return folded


def _excerpts(runs: Sequence[Run], max_chars: int) -> Iterator[Excerpt]:
    limit = _limit([len(run.text) for run in runs], max_chars)
    for run in runs:
        if len(run.text) <= limit:
            yield Excerpt(run, shown(run.text))
            continue
        head, tail = 2 * limit // 3, limit // 3
        left_out = len(run.text) - head - tail
        yield Excerpt(run, shown(run.text[:head]), left_out, shown(run.text[-tail:]))


def _limit(lengths: Sequence[int], total: int) -> int:
    """The longest that a text may be, so that all of them, the longer ones cut, fit in `total`."""
    room = total
    for index, length in enumerate(sorted(lengths)):
        share = room // (len(lengths) - index)
        if length > share:
            return min(max(share, _LEAST_CHARS), _MOST_CHARS)
        room -= length
    return _MOST_CHARS
