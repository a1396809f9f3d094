"""One request's keys and values: its buffers, the states on loan, and what each row holds."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakValueDictionary

import numpy as np
import torch

from pcache_core.kv.state import KVState, Stack, by_layer

_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class Loan:
    """A state that serves rows of a prompt from where it lies, for several requests at once.

    start: the prompt's row of its first token, which stands at `position`.
    replaced: rows that the buffers hold instead, because they were computed again; ascending.
    """

    state: KVState
    start: int
    position: int
    replaced: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        """One after the last row."""
        return self.start + self.state.num_tokens

    def head(self, stop: int) -> Loan:
        """Return what of it lies before row `stop`."""
        if stop >= self.stop:
            return self
        part = self.state.part(0, stop - self.start, self.state.position)
        return Loan(part, self.start, self.position, tuple(r for r in self.replaced if r < stop))

    def count_before(self, row: int) -> int:
        """Return how many rows before this one it serves."""
        return min(max(row - self.start, 0), self.state.num_tokens) - bisect_left(
            self.replaced, row
        )

    def without(self, rows: Collection[int]) -> Loan:
        """Return the same, but for rows that the buffers are to hold themselves."""
        replaced = {*self.replaced, *(row for row in rows if self.start <= row < self.stop)}
        return Loan(self.state, self.start, self.position, tuple(sorted(replaced)))

    @cached_property
    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each caching layer, [1, heads, tokens, head_dim]."""
        return [(keys[None], values[None]) for keys, values in self.state.layers()]


class KVBuffers:
    """One request's preallocated buffers, for the rows of its prompt that are not on loan.

    keys, values: one tensor for each of `stacks`, [layers, heads, capacity, head_dim].
    layers: views of them in layer order, keys and values [1, heads, capacity, head_dim].
    positions: [capacity], the position each row was encoded or computed at.
    loans: states that serve rows of the prompt from where they lie, in the prompt's order. Without
        any, row i holds the prompt's i-th token; see `index`.
    """

    __slots__ = ("capacity", "keys", "layers", "loans", "positions", "stacks", "values")

    def __init__(
        self,
        stacks: tuple[Stack, ...],
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def buffer(layers: int, heads: int, dim: int) -> torch.Tensor:
            return _empty((layers, heads, capacity, dim), dtype, device)

        self.stacks = stacks
        self.capacity = capacity
        self.keys = tuple(buffer(len(s.layers), s.shape.key_heads, s.shape.key_dim) for s in stacks)
        self.values = tuple(
            buffer(len(s.layers), s.shape.value_heads, s.shape.value_dim) for s in stacks
        )
        self.layers = [
            (keys[None], values[None]) for keys, values in by_layer(stacks, self.keys, self.values)
        ]
        self.positions = torch.zeros(capacity, dtype=torch.long, device=device)
        self.loans: list[Loan] = []

    def index(self, row: int) -> int:
        """Where the buffers hold a row of the prompt that is not on loan, or would hold it."""
        return row - sum(loan.count_before(row) for loan in self.loans)

    def own_rows(self, stop: int) -> torch.Tensor:
        """Return the rows of the prompt before `stop` that the buffers hold, ascending."""
        is_own = torch.ones(stop, dtype=torch.bool)
        for loan in self.loans:
            is_own[loan.start : loan.stop] = False
            is_own[list(loan.replaced)] = True
        return is_own.nonzero()[:, 0]

    def take_back(self, rows: Sequence[int], stop: int) -> None:
        """Make room for rows that are on loan, so that they can be computed.

        rows: of the prompt. stop: how many rows of the prompt the buffers hold or are to hold.
        """
        before = self.own_rows(stop)
        self.loans = [loan.without(rows) for loan in self.loans]
        is_before = torch.isin(self.own_rows(stop), before)
        moved = is_before.nonzero()[:, 0].to(self.positions.device)
        held = len(before)
        for tensor in (*self.keys, *self.values):
            tensor.index_copy_(2, moved, tensor[:, :, :held].clone())
        self.positions.index_copy_(0, moved, self.positions[:held].clone())

    def shorten(self, rows: int) -> None:
        """Keep only what loans serve of the prompt's first rows."""
        self.loans = [loan.head(rows) for loan in self.loans if loan.start < rows]

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers; what is on loan is held by others."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def state(self, rows: Sequence[int], token_ids: Sequence[int], position: int) -> KVState:
        """Copy rows out as the state of `token_ids`, the first encoded at `position`."""
        index = torch.tensor(rows, device=self.positions.device)
        return KVState(
            stacks=self.stacks,
            keys=tuple(keys.index_select(2, index) for keys in self.keys),
            values=tuple(values.index_select(2, index) for values in self.values),
            token_ids=tuple(token_ids),
            position=position,
        )

    def copy_rows(self, source: KVBuffers, stop: int) -> None:
        """Copy the prompt's first `stop` rows from other buffers; share what they have on loan."""
        self.loans = list(source.loans)
        self.shorten(stop)
        stop = self.index(stop)
        for mine, theirs in zip(
            (*self.keys, *self.values), (*source.keys, *source.values), strict=True
        ):
            mine[:, :, :stop].copy_(theirs[:, :, :stop])
        self.positions[:stop].copy_(source.positions[:stop])


def _empty(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Uninitialised memory. NumPy's comes in large pages on Linux, which are quick to touch."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    content = torch.from_numpy(np.empty(nbytes + _ALIGNMENT, np.uint8))
    start = -content.data_ptr() % _ALIGNMENT
    return content[start : start + nbytes].view(dtype).reshape(shape)


COMPUTED = ""
"""Label of a row whose keys and values equal those of a full prefill."""

REPAIRED = "*"
"""Label of a row that was computed again."""

NO_WEIGHTS = -1
"""Version of weights that no model has: what they computed serves nobody."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class KVSequence:
    """Keys and values of one request, and what each of its rows holds.

    make_buffers: makes larger buffers. buffers: the buffers.
    token_ids, positions, labels: of every row that is filled: its token, where it stands and what
        it came from: `COMPUTED`, `REPAIRED`, or the digest of the state it was filled from.
    repair, repaired_for: the budget of the repair that made repaired rows, and the length of the
        prompt whose question chose them.
    attention: [2, rows] of the last prompt's question, see `prefill`; empty where it was not read.
    asked: that prompt's last token.
    uses: digests of the states that the request may use.
    lender: states on loan by their digests, which other running requests use as well; None where
        nothing is shared. A request that is alone with a state copies it into its buffers, where
        attention is fastest. One that comes while another uses the state leaves it where it lies:
        no copy, and one product serves the queries of all who do.
    is_filled: whether every row that is noted holds what its label says.
    weights: version of the weights that computed them, see `CausalLM.weights_version`.
    stock: appends tokens and returns the last one's logits, for a model whose cache is not rows per
        token; its buffers hold nothing.
    """

    make_buffers: Callable[[int], KVBuffers]
    buffers: KVBuffers
    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    repair: float | None = None
    repaired_for: int = 0
    attention: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    asked: int = -1
    uses: frozenset[str] = frozenset()
    lender: WeakValueDictionary[str, KVState] | None = None
    is_filled: bool = True
    weights: int = 0
    stock: Callable[[Sequence[int]], torch.Tensor] | None = None

    @property
    def end(self) -> int:
        """One after the largest position in use: where a token goes that is generated."""
        return max(self.positions, default=-1) + 1

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, and of the states on loan."""
        return self.buffers.nbytes + sum(loan.state.nbytes for loan in self.buffers.loans)

    def take_back(self, rows: Sequence[int]) -> None:
        """Let the buffers hold those of the rows that are on loan, so that they can be computed."""
        loans = self.buffers.loans
        if not loans:
            return
        lent = [row for row in rows if any(loan.start <= row < loan.stop for loan in loans)]
        if lent:
            self.reserve(len(self.token_ids), more=len(lent))
            self.buffers.take_back(lent, len(self.token_ids))

    def reserve(self, rows: int, *, more: int = 0) -> None:
        """Move to larger buffers if the prompt's first `rows` rows, and `more`, need it."""
        needed = self.buffers.index(rows) + more
        if needed > self.buffers.capacity:
            larger = self.make_buffers(max(needed, 2 * self.buffers.capacity))
            larger.copy_rows(self.buffers, len(self.token_ids))
            larger.loans = self.buffers.loans  # also of rows that are not filled yet
            self.buffers = larger

    def append(self, token_id: int, position: int) -> None:
        """Note a computed token in the next row."""
        self.token_ids.append(token_id)
        self.positions.append(position)
        self.labels.append(COMPUTED)

    def shorten(self, rows: int) -> None:
        """Forget all but the first rows."""
        del self.token_ids[rows:], self.positions[rows:], self.labels[rows:]
        self.buffers.shorten(rows)
        if rows < self.attention.shape[-1] - 1:
            self.attention = torch.empty(0)
        if REPAIRED not in self.labels:
            self.repair, self.repaired_for = None, 0

    def copy_from(self, other: KVSequence, rows: int) -> None:
        """Take over another sequence's first rows."""
        self.buffers.copy_rows(other.buffers, rows)
        self.token_ids, self.labels = other.token_ids[:rows], other.labels[:rows]
        self.positions = other.positions[:rows]
        self.repair, self.repaired_for = other.repair, other.repaired_for
        self.attention, self.asked = other.attention, other.asked
