"""New tokens laid end to end, each with its row in buffers and its position; no padding."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import torch

from pcache_core.kv.key import RowRange
from pcache_core.kv.sequence import KVBuffers, Loan


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of a batch that see the same rows, each only those up to its own.

    start, stop: the tokens, as indices into the batch. visible: row ranges, ascending; the last
    one holds the span's own rows.
    """

    start: int
    stop: int
    visible: tuple[RowRange, ...]


_BLOCK_TOKENS = 256
_SCATTERED_TOKENS = 32  # of a block whose rows are not consecutive
_LEAST_TOKENS = 64  # of a part; fewer cost nearly as much, and other kernels compute them
# Larger ones are made again for each layer instead of held all at once.
_LARGEST_KEPT_BIAS = 2**22


def _blocks(span: Span, rows: Sequence[int]) -> Iterator[Span]:
    """Cut a long span, so that its first tokens don't attend to rows that are hidden anyway.

    A span of exactly the rows it sees stays whole: a causal kernel skips the hidden half itself.
    """
    start, tokens = span.start, span.stop - span.start
    if tokens == sum(stop - start for start, stop in span.visible):
        yield span
        return
    while start < span.stop:
        stop = min(start + _BLOCK_TOKENS, span.stop)
        if rows[stop - 1] - rows[start] >= stop - start:
            stop = min(start + _SCATTERED_TOKENS, stop)
        yield _cut(span, start, stop, rows)
        start = stop


def _cut(span: Span, start: int, stop: int, rows: Sequence[int]) -> Span:
    """Tokens `start … stop`, which are of this span; no row after the last one's is visible."""
    end = rows[stop - 1] + 1
    return Span(start, stop, tuple((a, min(b, end)) for a, b in span.visible if a < end))


class Batch:
    """New tokens of one request; a forward computes one batch, or those of several requests.

    input_ids, positions, rows: [tokens]; `rows[i]` is where token i's keys and values go and,
        being the token's place in the prompt's order, what it may see: rows up to its own.
    num_rows: rows of the buffers that take part, written before or by this forward.
    places: rows of the prompt that the tokens stand in, where states are on loan, so that these
        are not the rows of the buffers.
    end: one after the largest position.
    watched: tokens whose attention is added up, by their index in the batch: a weight for each sum.
    num_logits: of how many of its last tokens a forward gives the logits.
    attention: [sums, rows of the prompt] fp32, how much the watched tokens attended to each, over
        heads and the layers that show it.
    """

    __slots__ = (
        "_biases",
        "_first_rows",
        "_last_rows",
        "_uncut",
        "attention",
        "end",
        "input_ids",
        "num_logits",
        "num_rows",
        "places",
        "positions",
        "rows",
        "buffers",
        "spans",
        "watched",
    )

    def __init__(
        self,
        buffers: KVBuffers,
        input_ids: Sequence[int],
        rows: Sequence[int],
        positions: Sequence[int],
        spans: Sequence[Span],
        watched: Mapping[int, Sequence[float]] = MappingProxyType({}),
    ) -> None:
        device = buffers.positions.device
        self.buffers = buffers
        self.input_ids = torch.tensor(input_ids, dtype=torch.long, device=device)
        self.rows = torch.tensor(rows, dtype=torch.long, device=device)
        self.positions = torch.tensor(positions, dtype=torch.long, device=device)
        self._uncut = tuple(spans)
        self.spans = tuple(block for span in spans for block in _blocks(span, rows))
        self.num_rows = max(span.visible[-1][1] for span in self.spans)
        self.watched = watched
        self.attention = self._no_attention(self.num_rows)
        self.num_logits = 1
        self.end = max(positions) + 1
        self.places: tuple[int, ...] = ()
        self._first_rows = {span: rows[span.start] for span in self.spans}
        self._last_rows = {span: rows[span.stop - 1] for span in self.spans}
        self._biases: dict[tuple[Span, int | None, int, torch.dtype, int], torch.Tensor] = {}
        buffers.positions.index_copy_(0, self.rows, self.positions)

    @classmethod
    def of_rows(
        cls,
        buffers: KVBuffers,
        input_ids: Sequence[int],
        rows: Sequence[int],
        positions: Sequence[int],
        watched: Mapping[int, Sequence[float]] = MappingProxyType({}),
        *,
        num_logits: int = 1,
    ) -> Batch:
        """Return one request's tokens, which see every row up to their own.

        rows: of the prompt, ascending, none of them on loan.
        """
        own = [buffers.index(row) for row in rows] if buffers.loans else rows
        span = Span(0, len(own), ((0, own[-1] + 1),))
        batch = cls(buffers, input_ids, own, positions, [span], watched)
        batch.num_logits = num_logits
        if buffers.loans:
            batch.places = tuple(rows)
            batch.attention = batch._no_attention(rows[-1] + 1)
        return batch

    @property
    def loans(self) -> list[tuple[Loan, int]]:
        """States on loan that tokens see, and the first of the tokens that does."""
        firsts = ((loan, bisect_right(self.places, loan.start)) for loan in self.buffers.loans)
        return [(loan, first) for loan, first in firsts if first < len(self.places)]

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return len(self.rows)

    def parts(self, most: int) -> list[Batch]:
        """Cut into batches of about `most` tokens, to be computed in this order.

        The borders follow from the spans alone, so that the same batch is always rounded alike:
        a span is cut at multiples of `most` from its first token, and never so that fewer than
        `_LEAST_TOKENS` are left. Spans that fit one part together share it.
        Later tokens of a span see the earlier ones in the buffers, as they do within one forward.
        All parts add to the same `attention`.
        """
        borders = self._borders(most)
        if not borders:
            return [self]
        parts = [self._part(*ends) for ends in pairwise((0, *borders, self.num_tokens))]
        for part in parts:
            part.attention = self.attention
        parts[-1].num_logits = self.num_logits
        return parts

    def _borders(self, most: int) -> list[int]:
        """First tokens of all parts but the first."""
        starts = [
            start
            for span in self._uncut
            for start in range(span.start, max(span.stop - _LEAST_TOKENS, span.start) + 1, most)
        ]
        borders, begun = [], 0
        for start, stop in pairwise((*starts, self.num_tokens)):
            if stop - begun > most and start > begun:
                borders.append(start)
                begun = start
        return borders

    def _part(self, start: int, stop: int) -> Batch:
        ids, rows, positions = (
            numbers[start:stop].tolist() for numbers in (self.input_ids, self.rows, self.positions)
        )
        spans = [
            _cut(span, max(span.start, start) - start, min(span.stop, stop) - start, rows)
            for span in self._uncut
            if span.start < stop and start < span.stop
        ]
        watched = {i - start: weight for i, weight in self.watched.items() if start <= i < stop}
        part = Batch(self.buffers, ids, rows, positions, spans, watched)
        part.places = self.places[start:stop]
        return part

    def watched_in(self, tokens: range) -> tuple[list[int], torch.Tensor]:
        """Return the watched ones of these tokens, and their weights, [sums, tokens]."""
        found = [index for index in self.watched if index in tokens]
        weights = list(zip(*(self.watched[index] for index in found), strict=True))
        return found, torch.tensor(weights, device=self.rows.device)

    def _no_attention(self, rows: int) -> torch.Tensor:
        sums = len(next(iter(self.watched.values()), ()))
        return torch.zeros(sums, rows if sums else 0, device=self.rows.device)

    def bias(
        self, span: Span, window: int | None, group: int, dtype: torch.dtype, first: int = 0
    ) -> torch.Tensor | None:
        """What is added to attention scores: 0 where a row may be seen, the minimum elsewhere.

        window: a row further back than this many positions is hidden; None for no limit.
        group: query heads folded into query rows, see `attention.py`.
        first: how many of the visible rows to leave out, from the first on.
        Returns: [group * tokens, visible rows] of `dtype`; None if every token sees every row.
        """
        if window is not None and self.end <= window:
            window = None
        if window is None and self._sees_all(span):
            return None
        name = (span, window, group, dtype, first)
        if name not in self._biases:
            hidden = ~self._allowed(span, window, first)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            bias.masked_fill_(hidden, torch.finfo(dtype).min)
            bias = bias.repeat(group, 1)
            if bias.numel() > _LARGEST_KEPT_BIAS:
                return bias
            self._biases[name] = bias
        return self._biases[name]

    def seen_by_all(self, span: Span, window: int | None) -> int:
        """Return how many of the visible rows, from the first on, every token of the span sees."""
        if window is not None and self.end > window:
            return 0
        before = sum(stop - start for start, stop in span.visible[:-1])
        return before + self._first_rows[span] - span.visible[-1][0]

    def is_plain_causal(self, span: Span, window: int | None) -> bool:
        """Whether the span's tokens are exactly the rows it sees, and no window hides any."""
        rows = sum(stop - start for start, stop in span.visible)
        return rows == span.stop - span.start > 1 and (window is None or self.end <= window)

    def _sees_all(self, span: Span) -> bool:
        return span.stop - span.start == 1 and self._last_rows[span] == span.visible[-1][1] - 1

    def _allowed(self, span: Span, window: int | None, first: int) -> torch.Tensor:
        device = self.rows.device
        key_rows = torch.cat([torch.arange(*visible, device=device) for visible in span.visible])
        key_rows = key_rows[first:]
        query_rows = self.rows[span.start : span.stop]
        allowed = key_rows[None, :] <= query_rows[:, None]  # [tokens, visible rows]
        if window is not None:
            oldest = self.positions[span.start : span.stop] - window
            allowed &= self.buffers.positions[key_rows][None, :] > oldest[:, None]
        return allowed
