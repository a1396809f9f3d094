"""Prompt lookup: an answer that quotes goes on as the text did where it said the same before."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

# Measured on answers of a small chat model that quote, retell and invent: the longer match is more
# often right, the shorter one finds a quotation a token sooner.
_NGRAMS = (3, 2)
_FIRST_DRAFT = 4
_LONGEST_DRAFT = 15
_LONGEST_PAUSE = 16


class PromptLookup:
    """Drafts what may follow in a text: what followed its last few tokens the last time.

    Drafts grow as long as they are right. After wrong ones, a few chances are let pass, more each
    time, so that a text that quotes nothing hardly pays for them.

    token_ids: of the text so far.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = list(token_ids)
        self._after: dict[tuple[int, ...], int] = {}  # where the text goes on after an n-gram
        self._num_indexed = 0
        self._draft: list[int] = []
        self._drafted_at = 0
        self._most = _FIRST_DRAFT
        self._pause = 0  # chances to let pass after the next wrong draft
        self._passes = 0  # chances to let pass now

    def add(self, token_id: int) -> None:
        """Note the text's next token."""
        self._token_ids.append(token_id)

    def draft(self, most: int) -> list[int]:
        """Return up to `most` tokens that may follow; often none."""
        if self._draft:
            self._learn()
        found = self._find(min(most, self._most)) if most > 0 else []
        if found and self._passes:
            self._passes -= 1
            found = []
        self._draft, self._drafted_at = found, len(self._token_ids)
        return found

    def _learn(self) -> None:
        """Draft more or less, by how much of the last draft was right."""
        followed = self._token_ids[self._drafted_at :]
        pairs = zip(self._draft, followed, strict=False)
        right = next((i for i, (a, b) in enumerate(pairs) if a != b), len(self._draft))
        if right == 0:
            self._pause = min(2 * self._pause or 1, _LONGEST_PAUSE)
            self._passes, self._most = self._pause, _FIRST_DRAFT
            return
        self._pause = 0
        longer = 2 * self._most if right == len(self._draft) else right + 1
        self._most = min(max(longer, _FIRST_DRAFT), _LONGEST_DRAFT)

    def _find(self, most: int) -> list[int]:
        """Return what followed the longest n-gram that the text ends in, where it came last."""
        self._index()
        for length in _NGRAMS:
            start = self._after.get(tuple(self._token_ids[-length:]))
            if start is not None:  # what reaches the text's end goes round again
                return list(islice(cycle(self._token_ids[start : start + most]), most))
        return []

    def _index(self) -> None:
        """Note the n-grams that tokens have followed since the last time."""
        ids, stop = self._token_ids, len(self._token_ids)
        for length in _NGRAMS:
            start = min(max(self._num_indexed, length), stop)
            ngrams = zip(
                *(ids[start - back : stop - back] for back in range(length, 0, -1)), strict=True
            )
            self._after.update(zip(ngrams, range(start, stop), strict=True))
        self._num_indexed = stop
