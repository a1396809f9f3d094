"""Attention over slots: our function behind transformers' `AttentionInterface`.

Queries of a ragged batch attend request by request and span by span. Grouped-query heads are folded
into query rows, so keys and values are never copied per head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from pcache_core.lm.batch import Batch, Span
from pcache_core.lm.ragged import RaggedBatch

IMPLEMENTATION = "pcache"


class UnsupportedAttentionError(Exception):
    """The model's attention needs something this function does not do."""


def slot_attention(  # noqa: PLR0913 (transformers' signature)
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    pcache_batch: RaggedBatch | None = None,
    pcache_windows: dict[int, int | None] | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend the tokens of each batch to their slot's rows.

    query: [1, heads, tokens, dim]. key, value: [1, kv heads, rows, dim], the first slot's rows.
    s_aux: [heads], attention sinks: a logit per head that takes part in the softmax alone.
    Returns: [1, tokens, heads, value dim].
    """
    if pcache_batch is None or pcache_windows is None:
        raise UnsupportedAttentionError("the model does not pass our arguments to its attention")
    if position_bias is not None or dropout:
        raise UnsupportedAttentionError("position bias and dropout are not supported")
    rows = pcache_batch.rows(key, value)
    if query.shape[0] != 1 or rows is None:
        raise UnsupportedAttentionError("keys are not the slot's rows")
    layer = _layer_index(module)
    window = pcache_windows[layer]
    # What a question looks for shows in the upper half; below, tokens look at their neighbours.
    is_upper = layer >= len(pcache_windows) // 2
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind = _Kind(window, scale, softcap, s_aux)
    outputs = []
    for batch, start, (keys, values) in zip(
        pcache_batch.parts, pcache_batch.starts, rows, strict=False
    ):
        own = query[:, :, start : start + batch.num_tokens]
        watches = is_upper and batch.watched is not None
        for span in batch.spans:
            queries = own[:, :, span.start : span.stop]
            seen = _visible(keys, span), _visible(values, span)
            if watches:
                _watch(batch, span, queries, seen[0], kind)
            outputs.append(_attend_span(batch, span, queries, *seen, kind))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output.transpose(1, 2), None  # [1, tokens, heads, value dim]


AttentionInterface.register(IMPLEMENTATION, slot_attention)


@dataclass(frozen=True, slots=True, eq=False)
class _Kind:
    """How a layer attends.

    window: see `Batch.bias`. scale: of the scores. softcap: Gemma 2's. sinks: GPT-OSS's, [heads].
    """

    window: int | None
    scale: float
    softcap: float | None
    sinks: torch.Tensor | None


def _attend_span(
    batch: Batch,
    span: Span,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kind: _Kind,
) -> torch.Tensor:
    """Attend a span's tokens to the rows it sees: [1, heads, tokens, value dim]."""
    group = query.shape[1] // key.shape[1]
    if kind.softcap is not None or kind.sinks is not None:
        bias = batch.bias(span, kind.window, group, torch.float32)
        return _attend_by_matmul(query * kind.scale, key, value, bias, kind)
    if batch.is_plain_causal(span, kind.window):
        return _attend_causal(query, key, value, kind.scale)
    bias = batch.bias(span, kind.window, group, query.dtype)
    return _attend(query, key, value, bias, kind.scale)


def _layer_index(module: torch.nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise UnsupportedAttentionError("attention modules don't know their layer index")
    return index


def _visible(rows: torch.Tensor, span: Span) -> torch.Tensor:
    """The rows a span sees: a view where they are contiguous."""
    parts = [rows[:, :, start:stop] for start, stop in span.visible]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _fold(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Fold each group of query heads into query rows: [1, kv heads, group * tokens, dim]."""
    _, heads, tokens, dim = query.shape
    return query.reshape(1, kv_heads, heads // kv_heads * tokens, dim)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    output = F.scaled_dot_product_attention(
        _fold(query, key.shape[1]), key, value, attn_mask=bias, scale=scale
    )
    return output.reshape(*query.shape[:3], value.shape[-1])


def _attend_causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Square and contiguous: the one case where a causal flag says the same as the rows do."""
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def _attend_by_matmul(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    kind: _Kind,
) -> torch.Tensor:
    """Attention with logit soft-capping (Gemma 2) or sinks (GPT-OSS); query is scaled already."""
    weights = _weights(query, key, bias, kind).to(value.dtype)
    return torch.matmul(weights, value).reshape(*query.shape[:3], value.shape[-1])


def _weights(
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor | None,
    kind: _Kind,
) -> torch.Tensor:
    """Attention probabilities, softmax in fp32: [1, kv heads, group * tokens, rows]."""
    group = query.shape[1] // key.shape[1]
    scores = torch.matmul(_fold(query, key.shape[1]), key.transpose(-1, -2)).float()
    if kind.softcap is not None:
        scores = torch.tanh(scores / kind.softcap) * kind.softcap
    if bias is not None:
        scores = scores + bias
    if kind.sinks is not None:
        tokens = query.shape[2]
        column = kind.sinks.float().reshape(1, key.shape[1], group, 1, 1)
        column = column.expand(-1, -1, -1, tokens, -1).reshape(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)  # the sink takes weight and gives nothing
    return torch.softmax(scores, dim=-1)[..., : key.shape[2]]


def _watch(batch: Batch, span: Span, query: torch.Tensor, key: torch.Tensor, kind: _Kind) -> None:
    """Add what the watched tokens of a span attend to."""
    assert batch.watched is not None
    start, stop = max(batch.watched.start, span.start), min(batch.watched.stop, span.stop)
    if start >= stop:
        return
    bias = batch.bias(span, kind.window, query.shape[1] // key.shape[1], torch.float32)
    weights = _weights(query * kind.scale, key, bias, kind)
    tokens, rows = span.stop - span.start, weights.shape[-1]
    by_token = weights.reshape(-1, tokens, rows)  # [heads, tokens, rows]
    seen = by_token[:, start - span.start : stop - span.start].sum((0, 1))
    at = 0
    for first, last in span.visible:
        batch.attention[first:last] += seen[at : at + last - first]
        at += last - first
