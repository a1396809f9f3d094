"""Attention to states that several requests share, once for all their queries.

A state lies where it was encoded, and each request has it at a position of its own. Turning keys
forward by some angle or queries back by it gives the same scores, so it is the queries that turn
here: the state is read as it is, by all who see it, in one product. What each query sees elsewhere
is merged with it by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pcache_core.kv import Loan
from pcache_core.lm.batch import Batch
from pcache_core.lm.kernels import attend_with_lse, merge
from pcache_core.lm.relocation import Rotation


class SharedStates:
    """The states on loan to the batches of one forward, and which tokens see which of them."""

    def __init__(self, parts: Sequence[Batch], starts: Sequence[int]) -> None:
        seen: dict[int, list[tuple[Loan, range]]] = {}
        for part, start in zip(parts, starts, strict=False):
            for loan, first in part.loans:
                tokens = range(start + first, start + part.num_tokens)
                seen.setdefault(id(loan.state), []).append((loan, tokens))
        self._loans = [users[0][0] for users in seen.values()]
        if not seen:
            return
        self._sizes = [sum(len(tokens) for _, tokens in users) for users in seen.values()]
        flat = [(loan, tokens) for users in seen.values() for loan, tokens in users]
        device = parts[0].positions.device
        seeing = [token for _, own in flat for token in own]
        self._tokens = torch.tensor(seeing, dtype=torch.long, device=device)
        placed = [loan.position for loan, own in flat for _ in own]
        self._placed = torch.tensor(placed, dtype=torch.long, device=device)
        encoded = [loan.state.position for loan, own in flat for _ in own]
        self._encoded = torch.tensor(encoded, dtype=torch.long, device=device)
        self._turns: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._loans)

    def attend(
        self,
        query: torch.Tensor,
        own: torch.Tensor,
        own_lse: torch.Tensor,
        layer: int,
        rotation: Rotation | None,
        scale: float,
    ) -> torch.Tensor:
        """Attention to what a query's slot holds and to what it has on loan.

        query: [1, heads, tokens, dim]. own: attention to the slot, [1, heads, tokens, value dim].
        own_lse: [1, heads, tokens]. layer: among the caching ones. Returns: as `own`.
        """
        queries = self._turned(query[0].index_select(1, self._tokens), rotation)
        parts = len(self._loans) + 1
        outputs = own.new_zeros(parts, *own.shape[1:])
        lses = own_lse.new_full((parts, *own_lse.shape[1:]), float("-inf"))
        outputs[0], lses[0] = own[0], own_lse[0]
        shares = zip(
            self._loans,
            torch.split_with_sizes(queries, self._sizes, dim=1),
            torch.split_with_sizes(self._tokens, self._sizes),
            strict=True,
        )
        for part, (loan, asking, tokens) in enumerate(shares, 1):
            keys, values = loan.layers[layer]
            output, lse = attend_with_lse(asking[None], keys, values, None, scale)
            outputs[part].index_copy_(1, tokens, output[0])
            lses[part].index_copy_(1, tokens, lse[0])
        return merge(outputs, lses)[None]

    def _turned(self, queries: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        """Queries, [heads, tokens, dim], turned from where states stand to where they lie."""
        if rotation is None:
            return queries
        name = id(rotation.frequencies)
        if name not in self._turns:
            angles = rotation.angles(self._placed, self._encoded)
            self._turns[name] = (angles.cos().float(), angles.sin().float())
        turned = torch.empty_like(queries)
        rotation.turn(queries, *self._turns[name], out=turned)
        return turned
