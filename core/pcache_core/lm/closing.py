"""The way to an end: tokens that complete a text which follows a grammar.

A grammar alone keeps a weak model from writing anything wrong, not from writing on and on: a
string, an array or a nesting without limit. So a short completion is known at every token, and a
token that leaves no room for one is not taken.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

Plan = tuple[int, ...]
"""Tokens that lead to a complete text; empty for one that is complete."""

# What ends a JSON value soonest comes first.
_IN_STRING = b'"'
_OUTSIDE = b'}]",:0ntf123456789-[{'
_MANY = 40  # first bytes, from which on the text is free and one letter is as good as another
_KEPT_ALIKE = 3
_FIRST_STEPS = 3000
_SHORTER_STEPS = 500
_NEXT_STEPS = 120
_STRUCTURE = re.compile(rb'\\.|["{}[\]]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Prices:
    """What a search avoids, against 1 for a second choice instead of the first.

    token: price of a token. mark: of a bracket or quote that is open. commits: whether a string
    that is done is never taken back for want of what comes after it.
    """

    token: float
    mark: float
    commits: bool


_QUICK = _Prices(token=0.03, mark=0.5, commits=True)  # finds some end at once
_SHORT = _Prices(token=1, mark=1, commits=False)  # finds a shorter one where it is near


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """The tokens' bytes, as far as a search needs them.

    texts: of each token, empty for special ones. first_byte: -1 for special ones.
    """

    texts: Sequence[bytes]
    first_byte: NDArray[np.int16]
    num_bytes: NDArray[np.int32]

    @classmethod
    def of(cls, tokenizer: LLTokenizer) -> Vocabulary:
        """Read every token once."""
        texts = [
            b"" if tokenizer.is_special_token(token) else tokenizer.decode_bytes([token])
            for token in range(tokenizer.vocab_size)
        ]
        return cls(
            texts,
            np.array([text[0] if text else -1 for text in texts], np.int16),
            np.array([len(text) for text in texts], np.int32),
        )

    def choices(self, allowed: NDArray[np.intp], preferred: bytes) -> list[int]:
        """The tokens worth a try: the shortest for each first byte, the preferred ones first."""
        firsts = self.first_byte[allowed]
        allowed, firsts = allowed[firsts >= 0], firsts[firsts >= 0]
        order = np.argsort(self.num_bytes[allowed], kind="stable")
        kinds, places = np.unique(firsts[order], return_index=True)
        shortest = dict(zip(kinds.tolist(), allowed[order][places].tolist(), strict=True))
        first = [byte for byte in preferred if byte in shortest]
        others = [byte for byte in shortest if byte not in preferred]
        if len(shortest) > _MANY:
            letters = [byte for byte in others if chr(byte).isalnum() or byte > 127]
            others = letters[:2] + [byte for byte in others if byte not in letters]
        return [shortest[byte] for byte in (*first, *others)]


class OpenBrackets(NamedTuple):
    """What a text has opened and not closed, read as JSON; an estimate of what an end costs."""

    brackets: int = 0
    in_string: bool = False

    def after(self, text: bytes) -> OpenBrackets:
        """Return what is open after some more text."""
        brackets, in_string = self
        for part in _STRUCTURE.findall(text):
            if part == b'"':
                in_string = not in_string
            elif not in_string:
                brackets += 1 if part in b"{[" else -1
        return OpenBrackets(brackets, in_string)

    @property
    def marks(self) -> int:
        """How many marks close all of it."""
        return max(self.brackets, 0) + self.in_string


def token_mask(matcher: LLMatcher, vocab_size: int) -> NDArray[np.bool_]:
    """Return whether each token may come next, [vocab_size]; none beyond the tokenizer's."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    mask = np.unpackbits(bits, bitorder="little")[:vocab_size].astype(bool)
    return np.pad(mask, (0, max(vocab_size - len(mask), 0)))


def shortest_plan(matcher: LLMatcher, vocabulary: Vocabulary, hints: Sequence[Plan]) -> Plan | None:
    """Return a way to an end from the beginning, the shortest one found; None if none is.

    hints: tokens that may be what a string must hold.
    """
    found = [
        _Search(vocabulary, (), hints, prices).run(matcher, OpenBrackets(), most_steps)
        for prices, most_steps in ((_QUICK, _FIRST_STEPS), (_SHORT, _SHORTER_STEPS))
    ]
    return min((plan for plan in found if plan is not None), key=len, default=None)


def next_plan(
    matcher: LLMatcher,
    vocabulary: Vocabulary,
    opened: OpenBrackets,
    known: Plan,
    hints: Sequence[Plan],
) -> Plan | None:
    """Return a way to an end, or None if none is near.

    opened: by the text so far. known: a way to an end from the state before, of which the last
    part may still fit. hints: tokens that may be what a string must hold.
    """
    rejoined = _rejoin(matcher, known)
    if rejoined is not None:
        return rejoined
    return _Search(vocabulary, known, hints, _QUICK).run(matcher, opened, _NEXT_STEPS)


def _rejoin(matcher: LLMatcher, known: Plan) -> Plan | None:
    """Return the shortest end of a known way that is a way from here, too."""
    if matcher.is_accepting():
        return ()
    for start in range(len(known) - 1, -1, -1):
        if _leads_to_end(matcher, known[start:]):
            return known[start:]
    return None


def _leads_to_end(matcher: LLMatcher, tokens: Sequence[int]) -> bool:
    if matcher.validate_tokens(list(tokens)) < len(tokens):
        return False
    end = matcher.deep_copy()
    return end.consume_tokens(list(tokens)) and end.is_accepting()


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """A state on the way. effort: what its choices and tokens cost."""

    matcher: LLMatcher
    tokens: Plan
    opened: OpenBrackets
    effort: float


class _Search:
    """Best first: few second choices, tokens and open marks.

    States that look alike are tried a few times.
    """

    def __init__(
        self, vocabulary: Vocabulary, known: Plan, hints: Sequence[Plan], prices: _Prices
    ) -> None:
        self._vocabulary = vocabulary
        self._known = known
        self._hints = hints
        self._prices = prices
        self._order = count()
        self._seen: dict[tuple[bytes, int, OpenBrackets], int] = {}
        self._queue: list[tuple[float, int, _State]] = []

    def run(self, matcher: LLMatcher, opened: OpenBrackets, most_steps: int) -> Plan | None:
        """Search from a state; `opened` by the text before it."""
        self._push(_State(matcher, (), opened, 0))
        for _ in range(most_steps):
            if not self._queue:
                return None
            _, _, state = heapq.heappop(self._queue)
            rest = _rejoin(state.matcher, self._known)
            if rest is not None:
                return (*state.tokens, *rest)
            for rank, step in enumerate(self._steps(state)):
                self._go(state, step, rank)
        return None

    def _go(self, state: _State, step: Plan, rank: int) -> None:
        matcher = state.matcher.deep_copy()
        if not matcher.consume_tokens(list(step)):
            return
        opened = state.opened.after(b"".join(self._vocabulary.texts[token] for token in step))
        effort = state.effort + math.log2(1 + rank) + self._prices.token * len(step)
        if self._prices.commits and state.opened.in_string and not opened.in_string:
            effort = 0
        self._push(_State(matcher, (*state.tokens, *step), opened, effort))

    def _push(self, state: _State) -> None:
        cost = state.effort + self._prices.mark * state.opened.marks
        heapq.heappush(self._queue, (cost, next(self._order), state))

    def _steps(self, state: _State) -> Iterable[Plan]:
        forced = state.matcher.compute_ff_tokens()
        if forced and state.matcher.validate_tokens(forced) == len(forced):
            return [tuple(forced)]
        bits = state.matcher.compute_bitmask()
        alike = (bits, len(state.tokens), state.opened)
        self._seen[alike] = self._seen.get(alike, 0) + 1
        if self._seen[alike] > _KEPT_ALIKE:
            return []
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little"))
        allowed = allowed[allowed < len(self._vocabulary.texts)]
        if not state.opened.in_string:
            return [(token,) for token in self._vocabulary.choices(allowed, _OUTSIDE)]
        single = [(token,) for token in self._vocabulary.choices(allowed, _IN_STRING)]
        hinted = [
            hint for hint in self._hints if state.matcher.validate_tokens(list(hint)) == len(hint)
        ]
        may_end = self._vocabulary.first_byte[single[0][0]] in _IN_STRING if single else False
        return [*single[:1], *hinted, *single[1:]] if may_end else [*hinted, *single]
