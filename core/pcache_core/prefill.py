"""Online: computing what no state holds, and repairing some of what states hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pcache_core.assemble import Filling
from pcache_core.lm import Batch, CausalLM
from pcache_core.params import RepairPolicy
from pcache_core.plan import TokenisedPrompt, computed_rows
from pcache_core.repair import head_rows, most_attended, query_count, spread_rows
from pcache_core.slots import COMPUTED, REPAIRED, Lease

# The answer begins behind the last token; what it is read from, the last few look for.
_WATCHED_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Work:
    """The rows of a prompt that have to run through the model.

    missing: rows that neither the prefix nor a state holds.
    stale: rows of states that were encoded without sight of what stands before them.
    repaired: stale rows that are computed again in any case.
    choices: how many more of them the question chooses, by what it attends to.
    """

    missing: tuple[int, ...]
    stale: tuple[int, ...] = ()
    repaired: tuple[int, ...] = ()
    choices: int = 0


def work(
    lm: CausalLM,
    lease: Lease,
    tokens: TokenisedPrompt,
    fillings: Sequence[Filling],
    policy: RepairPolicy | None,
    reusable: int,
) -> Work:
    """Say what has to be computed. Takes note in the lease of what its rows hold.

    reusable: how many of the prompt's tokens are of modules, whatever serves them this time: the
        policy's shares are of these, so that what is repaired doesn't depend on earlier requests.
    """
    prefix = len(lease.token_ids)
    filled = [run for f in fillings for run in f.candidate.runs]
    missing = tuple(computed_rows(len(tokens.token_ids), [(0, prefix), *filled]))
    is_same_prompt = lease.repaired_for == len(tokens.token_ids) == prefix + 1
    _note(lease, tokens, fillings)
    stale = tuple(i for i, label in enumerate(lease.labels) if label not in (COMPUTED, REPAIRED))
    if policy is None or not stale or is_same_prompt:
        return Work(missing)
    fresh = sorted(run for f in fillings if not f.exact for run in f.candidate.runs)
    if not lm.watches:
        return Work(missing, stale, tuple(spread_rows(policy, fresh, reusable)))
    heads = tuple(head_rows(policy, fresh, reusable))
    choices = min(query_count(policy, reusable), len(stale) - len(heads))
    if len(heads) + choices == len(stale):
        return Work(missing, stale, stale)
    return Work(missing, stale, heads, choices)


def compute(lm: CausalLM, lease: Lease, todo: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the missing rows; logits of the last, [vocab], and attention to rows, [rows].

    Computed tokens see every token before them in the prompt's order. The attention is that of
    the question's last tokens; empty if it has nothing to choose. Rows to repair in any case are
    computed here then, too.
    """
    if not todo.choices:
        lease.take_back(todo.repaired, lm.new_slot)
        return _run(lm, lease, [*todo.missing, *todo.repaired]), torch.empty(0)
    count = len(todo.missing)
    watched = range(max(0, count - _WATCHED_TOKENS), count)
    batch = _batch(lease, todo.missing, watched)
    logits = lm.forward(batch)
    return logits, batch.attention


def repair(
    lm: CausalLM, lease: Lease, todo: Work, attention: torch.Tensor
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Compute again what the question attends to, and all that sees it; logits and repaired rows.

    Repaired tokens, and computed ones behind them, see what repair made of every token before.
    """
    others = sorted(set(todo.stale) - set(todo.repaired))
    chosen = sorted([*todo.repaired, *most_attended(others, attention, todo.choices)])
    behind = [row for row in todo.missing if row > chosen[0]]
    lease.take_back(chosen, lm.new_slot)
    return _run(lm, lease, [*chosen, *behind]), tuple(chosen)


def note_repair(lease: Lease, rows: Sequence[int], policy: RepairPolicy) -> None:
    """Mark rows as repaired, so that they serve only what continues this prompt."""
    for row in rows:
        lease.labels[row] = REPAIRED
    lease.repair, lease.repaired_for = policy, len(lease.token_ids)


def _run(lm: CausalLM, lease: Lease, rows: Sequence[int]) -> torch.Tensor:
    return lm.forward(_batch(lease, sorted(rows)))


def _batch(lease: Lease, rows: Sequence[int], watched: range | None = None) -> Batch:
    token_ids = [lease.token_ids[row] for row in rows]
    positions = [lease.positions[row] for row in rows]
    return Batch.of_rows(lease.slot, token_ids, rows, positions, watched)


def _note(lease: Lease, tokens: TokenisedPrompt, fillings: Sequence[Filling]) -> None:
    """Write down what every row of the prompt holds, or will hold when it is computed."""
    labels = [COMPUTED] * len(tokens.token_ids)
    labels[: len(lease.labels)] = lease.labels
    for filling in fillings:
        label = COMPUTED if filling.exact else filling.found.digest
        for start, stop in filling.candidate.runs:
            labels[start:stop] = [label] * (stop - start)
    lease.token_ids, lease.labels = list(tokens.token_ids), labels
    lease.positions = list(tokens.positions)
