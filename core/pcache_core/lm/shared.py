"""Attention to states that several requests share, once for all their queries.

A state lies where it was encoded, and each request has it at a position of its own. Turning keys
forward by some angle or queries back by it gives the same scores, so it is the queries that turn
here: the state is read as it is, by all who see it, in one product. What each query sees elsewhere
is merged with it by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pcache_core.kv.sequence import Loan
from pcache_core.lm.batch import Batch, Span
from pcache_core.lm.kernels import attend_with_lse, fold, merge
from pcache_core.lm.relocation import Rotation

LayerRows = tuple[torch.Tensor, torch.Tensor]
"""One layer's keys and values, [1, kv heads, rows, dim]: the rows that take part."""


@dataclass(frozen=True, slots=True, eq=False)
class _User:
    """A batch's tokens that see a state: `tokens` of the forward, rows `places` of its prompt."""

    loan: Loan
    tokens: range
    places: Sequence[int]

    @property
    def sees_all(self) -> bool:
        """Whether nothing of the state is hidden from any of the tokens."""
        return not self.loan.replaced and self.places[0] >= self.loan.stop

    def hidden(self) -> torch.Tensor:
        """[tokens, rows of the state] bool: what stands after a token, or was computed again."""
        state_rows = torch.arange(self.loan.start, self.loan.stop)
        hidden = state_rows[None, :] >= torch.tensor(self.places)[:, None]
        return hidden | torch.isin(state_rows, torch.tensor(self.loan.replaced))


class SharedStates:
    """The states on loan to the batches of one forward, and which tokens see which of them."""

    def __init__(self, parts: Sequence[Batch], starts: Sequence[int]) -> None:
        self._parts = list(zip(parts, starts, strict=False))
        groups: dict[int, list[_User]] = {}
        for part, start in self._parts:
            for loan, first in part.loans if part.places else ():
                tokens = range(start + first, start + part.num_tokens)
                user = _User(loan, tokens, part.places[first:])
                groups.setdefault(id(loan.state), []).append(user)
        self._groups = list(groups.values())
        self._tokens, self._placed, self._encoded = self._flat(parts[0].positions.device)
        self._biases = [_bias(users).to(self._tokens.device) for users in self._groups]
        self._turns: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._groups)

    def _flat(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Tokens of all groups, and where each one's state stands and where it was encoded."""
        users = [user for group in self._groups for user in group]
        numbers = (
            [token for user in users for token in user.tokens],
            [user.loan.position for user in users for _ in user.tokens],
            [user.loan.state.position for user in users for _ in user.tokens],
        )
        return tuple(torch.tensor(each, dtype=torch.long, device=device) for each in numbers)

    def at(
        self, layer: int, rotation: Rotation | None, query: torch.Tensor, scale: float
    ) -> _SharedLayer:
        """One layer's attention; `layer` among the caching ones. query: [1, heads, tokens, dim]."""
        queries = query[0].index_select(1, self._tokens)
        if rotation is not None:
            name = id(rotation.frequencies)
            if name not in self._turns:
                angles = rotation.angles(self._placed, self._encoded)
                self._turns[name] = (angles.cos().float(), angles.sin().float())
            turned = torch.empty_like(queries)
            rotation.turn(queries, *self._turns[name], out=turned)
            queries = turned
        sizes = [sum(len(user.tokens) for user in users) for users in self._groups]
        groups = [
            _Group(users, tokens, asking[None], *users[0].loan.layers[layer], bias)
            for users, tokens, asking, bias in zip(
                self._groups,
                torch.split_with_sizes(self._tokens, sizes),
                torch.split_with_sizes(queries, sizes, dim=1),
                self._biases,
                strict=True,
            )
        ]
        return _SharedLayer(self._parts, groups, query, scale)


def _bias(users: Sequence[_User]) -> torch.Tensor:
    """[tokens, rows of the state] fp32, 0 where seen and the minimum where not; empty if all is."""
    if all(user.sees_all for user in users):
        return torch.empty(0)
    hidden = torch.cat([user.hidden() for user in users])
    return torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Those who see one state: their queries, turned to where it lies, and its keys and values."""

    users: Sequence[_User]
    tokens: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor


class _SharedLayer:
    """Attention of one layer's queries to the states on loan."""

    def __init__(
        self,
        parts: Sequence[tuple[Batch, int]],
        groups: Sequence[_Group],
        query: torch.Tensor,
        scale: float,
    ) -> None:
        self._parts = parts
        self._groups = groups
        self._query = query
        self._scale = scale

    def attend(self, own: torch.Tensor, own_lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge attention to a query's buffers with attention to what they have on loan.

        own, own_lse: attention to the buffers, [1, heads, tokens, value dim], and its log-sum-exp,
            [1, heads, tokens].
        Returns: the same of both.
        """
        parts = len(self._groups) + 1
        outputs = own.new_zeros(parts, *own.shape[1:])
        lses = own_lse.new_full((parts, *own_lse.shape[1:]), float("-inf"))
        outputs[0], lses[0] = own[0], own_lse[0]
        for part, group in enumerate(self._groups, 1):
            output, lse = attend_with_lse(
                group.queries, group.keys, group.values, self._folded(group), self._scale
            )
            outputs[part].index_copy_(1, group.tokens, output[0])
            lses[part].index_copy_(1, group.tokens, lse[0])
        return merge(outputs, lses)[None], torch.logsumexp(lses, dim=0)[None]

    def _folded(self, group: _Group) -> torch.Tensor | None:
        if not group.bias.numel():
            return None
        limit = torch.finfo(group.queries.dtype).min
        folded = group.bias.clamp(min=limit).to(group.queries.dtype)
        return folded.repeat(group.queries.shape[1] // group.keys.shape[1], 1)

    def watch(self, rows: Sequence[LayerRows], lse: torch.Tensor) -> None:
        """Add what watched tokens attend to, in their buffers and in what these have on loan.

        rows: of each batch's buffers. lse: as `attend` gave it, over all that a query sees.
        """
        for (batch, start), (keys, _) in zip(self._parts, rows, strict=True):
            for span in batch.spans if batch.watched and batch.places else ():
                self._watch_span(batch, span, start, keys, lse)

    def _watch_span(
        self, batch: Batch, span: Span, start: int, keys: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Add what the watched tokens of a span attend to. start: of the batch in the forward."""
        tokens, weights = batch.watched_in(range(span.start, span.stop))
        if not tokens:
            return
        at_all = [start + token for token in tokens]
        stop = span.visible[-1][1]
        bias = batch.bias(span, None, 1, torch.float32)
        if bias is not None:
            bias = bias[[token - span.start for token in tokens]]
        places = batch.buffers.own_rows(batch.attention.shape[1])[:stop].to(keys.device)
        query, total = self._query[:, :, at_all], lse[:, :, at_all]
        batch.attention[:, places] += weights @ self._paid(query, keys[:, :, :stop], bias, total)
        for group, user, at in self._users():
            both = [number for number, token in enumerate(at_all) if token in user.tokens]
            if both:
                seen = [at + at_all[number] - user.tokens.start for number in both]
                bias = group.bias[seen] if group.bias.numel() else None
                paid = self._paid(group.queries[:, :, seen], group.keys, bias, total[:, :, both])
                lent = slice(user.loan.start, user.loan.stop)
                batch.attention[:, lent] += weights[:, both] @ paid

    def _users(self) -> Iterator[tuple[_Group, _User, int]]:
        """Everyone in every group, and where in the group's queries their own begin."""
        for group in self._groups:
            at = 0
            for user in group.users:
                yield group, user, at
                at += len(user.tokens)

    def _paid(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        bias: torch.Tensor | None,
        total: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of each token to each row, summed over heads: [tokens, rows] fp32."""
        kv_heads = key.shape[1]
        scores = torch.matmul(fold(query, kv_heads) * self._scale, key.transpose(-1, -2)).float()
        if bias is not None:
            scores += bias.repeat(query.shape[1] // kv_heads, 1)
        paid = (scores - total.reshape(1, kv_heads, -1, 1)).exp()
        return paid.reshape(-1, query.shape[2], paid.shape[-1]).sum(0)
