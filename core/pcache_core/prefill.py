"""Computing what neither the prefix nor a state holds, and repairing some of what states hold."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch

from pcache_core.kv.sequence import REPAIRED, KVSequence
from pcache_core.library.states import Loaded
from pcache_core.lm import Batch, CausalLM
from pcache_core.plan import PrefillPlan
from pcache_core.prompt import Piece
from pcache_core.report import Report, SegmentReport, Source
from pcache_core.store.base import ms_since

_LAST_TOKENS = 3
_ASKING_TOKENS, _REFERENCE_TOKENS, _REFERENCE_WEIGHT = 12, 3, 0.5


def prefill(
    lm: CausalLM, plan: PrefillPlan, loaded: Loaded, sequence: KVSequence
) -> tuple[torch.Tensor, Report]:
    """Compute a prompt's missing rows, then again those that are to be repaired.

    Computed tokens see every token before them in the prompt's order.

    Returns: logits of the token after the prompt, [vocab] fp32, and the request's report.
    """
    started = time.perf_counter()
    report = _describe(plan, loaded)
    sequence.token_ids = list(plan.request.tokens.token_ids)
    sequence.positions = list(plan.request.tokens.positions)
    sequence.labels = list(plan.labels)
    sequence.reserve(len(sequence.token_ids))
    repaired: list[int] = []
    if plan.repaired and not lm.watches:
        repaired = _first_rows(plan)
    observes = lm.watches and plan.request.observes
    watched = _watched(plan) if observes else {}
    logits, attention = _compute(lm, sequence, plan.missing, repaired, watched)
    report.prefill_ms = ms_since(started)
    if plan.repaired and lm.watches:
        started = time.perf_counter()
        repaired = most_attended(plan.stale, attention[0], plan.repaired)
        after = [row for row in plan.missing if row > repaired[0]]
        logits, _ = _compute(lm, sequence, after, repaired)
        report.repair_ms = ms_since(started)
    if repaired:
        for row in repaired:
            sequence.labels[row] = REPAIRED
        sequence.repair, sequence.repaired_for = plan.request.repair, len(sequence.token_ids)
        _describe_repair(report, plan, repaired)
    if observes:
        is_same_prompt = sequence.attention.shape[-1] == len(sequence.token_ids)
        if not is_same_prompt or sequence.asked != sequence.token_ids[-1]:
            sequence.attention, sequence.asked = attention[1:], sequence.token_ids[-1]
        _describe_attention(report, plan, sequence.attention)
    sequence.is_filled = True
    return logits, report


def _compute(
    lm: CausalLM,
    sequence: KVSequence,
    missing: Sequence[int],
    repaired: Sequence[int],
    watched: Mapping[int, tuple[float, ...]] = MappingProxyType({}),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute rows; return logits of the last, [vocab], and attention to rows, [3, rows].

    watched: whose attention it is, see `Batch`; it is empty where this is.
    """
    if sequence.stock is not None:
        return sequence.stock(sequence.token_ids), torch.empty(0)
    sequence.take_back(repaired)
    rows = sorted([*missing, *repaired])
    batch = Batch.of_rows(
        sequence.buffers,
        [sequence.token_ids[row] for row in rows],
        rows,
        [sequence.positions[row] for row in rows],
        watched,
    )
    logits = lm.forward(batch)[-1]
    return logits, batch.attention


def _watched(plan: PrefillPlan) -> dict[int, tuple[float, ...]]:
    """Weigh the tokens whose attention is read, by index in `missing`.

    Three means: of the last tokens, of those that ask, of those that they are compared with.

    The answer is read from the prompt's last few, which choose what is repaired.

    What answers the question shows in the last ones from the question on, less the first ones
    behind the documents: these don't know yet what is asked, so that what a model attends to
    whatever the question is (the last document above all) cancels out. In-context re-ranking takes
    a second forward with an empty question for that (arXiv 2410.02642).
    """
    behind, asked = (bisect_left(plan.missing, row) for row in plan.request.tokens.question)
    end = len(plan.missing)
    last = range(max(0, end - _LAST_TOKENS), end)
    asking = range(max(asked, behind + _REFERENCE_TOKENS, end - _ASKING_TOKENS), end)
    reference = range(behind, behind + _REFERENCE_TOKENS)
    if not asking:  # so few that there is nothing to compare with
        asking, reference = last, range(0)
    parts = (last, asking, reference)
    return {
        index: tuple(1 / len(part) if index in part else 0.0 for part in parts)
        for index in {*last, *asking, *reference}
    }


def _first_rows(plan: PrefillPlan) -> list[int]:
    """Choose what to repair where attention can't be observed: where modules begin."""
    depths: dict[int, int] = {}
    for row in plan.stale:
        follows = row - 1 in depths and plan.labels[row] == plan.labels[row - 1]
        depths[row] = depths[row - 1] + 1 if follows else 0
    return sorted(sorted(plan.stale, key=depths.__getitem__)[: plan.repaired])


def most_attended(rows: Sequence[int], attention: torch.Tensor, count: int) -> list[int]:
    """Choose `count` of the rows: those with most attention, each with the row after it.

    What a token means in its context, models write into the token that follows it as well.

    attention: [rows of the prompt]. Returns: ascending rows.
    """
    by_attention = torch.argsort(attention[torch.tensor(rows)], descending=True, stable=True)
    candidates = set(rows)
    chosen: set[int] = set()
    for index in by_attention[:count].tolist():
        for row in (rows[index], rows[index] + 1):
            if row in candidates and len(chosen) < count:
                chosen.add(row)
    return sorted(chosen)


def _describe(plan: PrefillPlan, loaded: Loaded) -> Report:
    """Begin the request's report: where each row comes from, nothing repaired yet."""
    request, tokens = plan.request, plan.request.tokens
    total = len(tokens.token_ids)
    sources: list[Source] = ["computed"] * total
    sources[: plan.prefix] = ["prefix"] * plan.prefix
    for planned in plan.states:
        for start, stop in planned.runs:
            sources[start:stop] = [loaded.sources[planned.key.digest]] * (stop - start)
    preambles = [0] * total
    for planned in request.states:
        for start, stop in planned.runs:
            if plan.labels[start] == planned.key.digest:
                count = len(planned.module.preamble_ids)
                preambles[start:stop] = [count] * (stop - start)
    encoded, computed = sources.count("encoded"), sources.count("computed")
    return Report(
        segments=tuple(_segment(piece, sources, preambles) for piece in tokens.pieces),
        prompt_tokens=total,
        cached_tokens=total - encoded - computed,
        encoded_tokens=encoded,
        computed_tokens=computed,
        reuse=request.reuse,
        fallback_reason=request.fallback_reason,
        load_ms=loaded.load_ms,
        assemble_ms=loaded.assemble_ms,
        shared_tokens=loaded.shared_tokens,
    )


def _describe_repair(report: Report, plan: PrefillPlan, rows: Sequence[int]) -> None:
    """Write into a report which rows were computed again."""
    report.repaired_tokens, report.repaired_rows = len(rows), tuple(rows)
    again = set(rows)
    segments = []
    for segment, piece in zip(report.segments, plan.request.tokens.pieces, strict=True):
        count = len(again.intersection(range(piece.start, piece.stop)))
        source = "repaired" if 2 * count > segment.num_tokens else segment.source
        segments.append(replace(segment, repaired_tokens=count, source=source))
    report.segments = tuple(segments)


def _describe_attention(report: Report, plan: PrefillPlan, attention: torch.Tensor) -> None:
    """Write into a report how much of the question's attention each segment gets.

    attention: [2, rows of the prompt]: of the tokens that ask, and of those before them. These
        count at most as much as attends to the documents at all.
    """
    pieces = plan.request.tokens.pieces
    asking, reference = (
        [sum(by_row[piece.start : piece.stop]) for piece in pieces] for by_row in attention.tolist()
    )
    documents = [i for i, piece in enumerate(pieces) if piece.segment.kind == "document"]
    most, compared = (sum(paid[i] for i in documents) for paid in (asking, reference))
    weight = _REFERENCE_WEIGHT * (min(1.0, most / compared) if compared else 1.0)
    shares = [max(0.0, a - weight * r) for a, r in zip(asking, reference, strict=True)]
    whole = sum(shares) or 1.0
    report.segments = tuple(
        replace(segment, attention=share / whole)
        for segment, share in zip(report.segments, shares, strict=True)
    )


def _segment(piece: Piece, sources: Sequence[Source], preambles: Sequence[int]) -> SegmentReport:
    here = sources[piece.start : piece.stop]
    return SegmentReport(
        kind=piece.segment.kind,
        name=piece.segment.name,
        text=piece.segment.text,
        num_tokens=len(here),
        source=max(dict.fromkeys(here), key=here.count) if here else "computed",
        preamble_tokens=max(preambles[piece.start : piece.stop], default=0),
    )
