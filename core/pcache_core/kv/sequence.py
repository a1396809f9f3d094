"""One request's keys and values, from its first token to its last answer token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch

from pcache_core.kv.buffers import KVBuffers
from pcache_core.kv.state import KVState

COMPUTED = ""
"""Label of a row whose keys and values equal those of a full prefill."""

REPAIRED = "*"
"""Label of a row that was computed again, or that stands after such a row."""

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
        self.attention = other.attention
