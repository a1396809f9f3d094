"""Attention over buffers: our function behind transformers' `AttentionInterface`.

Queries of a ragged batch attend request by request and span by span to what lies in their buffers,
and all together to each state that several requests share (see `shared.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from pcache_core.lm import kernels
from pcache_core.lm.batch import Batch, Span
from pcache_core.lm.ragged import RaggedBatch
from pcache_core.lm.relocation import Rotations

IMPLEMENTATION = "pcache"


class UnsupportedAttentionError(Exception):
    """The model's attention needs something this function does not do."""


@dataclass(slots=True, eq=False)
class AttentionLayers:
    """What the attention function has to know of a model's layers.

    windows: by layer, how many positions back it sees; None for all.
    rotations: of each caching layer's keys; None unless states may serve from where they lie.
    watched: layers that show what a question looks for: the third quarter of those that see the
        whole prompt, or of all if none in the upper half does. Below, tokens look at their
        neighbours, above at what they are about to say.
    """

    windows: dict[int, int | None]
    rotations: Rotations | None = None
    scratch: kernels.Scratch = field(default_factory=kernels.Scratch)
    watched: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        seeing = [layer for layer, window in self.windows.items() if window is None]
        is_seen_late = bool(seeing) and seeing[-1] >= len(self.windows) // 2
        layers = seeing if is_seen_late else list(self.windows)
        half = len(layers) // 2
        self.watched = frozenset(layers[half : max(half + 1, 3 * len(layers) // 4)])


def slot_attention(  # noqa: PLR0913 (transformers' signature)
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    pcache_batch: RaggedBatch | None = None,
    pcache_layers: AttentionLayers | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend the tokens of each batch to their buffers' rows.

    query: [1, heads, tokens, dim]. key, value: [1, kv heads, rows, dim], the first buffers' rows.
    s_aux: [heads], attention sinks: a logit per head that takes part in the softmax alone.
    Returns: [1, tokens, heads, value dim].
    """
    if pcache_batch is None or pcache_layers is None:
        raise UnsupportedAttentionError("the model does not pass our arguments to its attention")
    if position_bias is not None or dropout:
        raise UnsupportedAttentionError("position bias and dropout are not supported")
    rows = pcache_batch.rows(key, value)
    if query.shape[0] != 1 or rows is None:
        raise UnsupportedAttentionError("keys are not the buffers' rows")
    layer, windows = _layer_index(module), pcache_layers.windows
    is_watched = layer in pcache_layers.watched
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind = _Kind(windows[layer], scale, softcap, s_aux, pcache_layers.scratch)
    outputs, lses = [], []
    for batch, start, (keys, values) in zip(
        pcache_batch.parts, pcache_batch.starts, rows, strict=False
    ):
        own = query[:, :, start : start + batch.num_tokens]
        watches = is_watched and batch.watched
        for span in batch.spans:
            queries = own[:, :, span.start : span.stop]
            seen = _visible(keys, span), _visible(values, span)
            if watches and not batch.places:
                _watch(batch, span, queries, seen[0], kind)
            output, lse = _attend_span(batch, span, queries, *seen, kind)
            outputs.append(output)
            if pcache_batch.shared:
                lses.append(_no_lse(queries) if lse is None else lse)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    if pcache_batch.shared:
        assert pcache_layers.rotations is not None, "loans are for models that can share"
        rotation = pcache_layers.rotations[layer]
        shared = pcache_batch.shared.at(layer, rotation, query, scale)
        output, lse = shared.attend(output, torch.cat(lses, dim=2))
        if is_watched:
            shared.watch(rows, lse)
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
    scratch: kernels.Scratch


def _attend_span(
    batch: Batch,
    span: Span,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kind: _Kind,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend a span's tokens to the rows it sees: [1, heads, tokens, value dim].

    And the log-sum-exp of the scores, [1, heads, tokens]; None where nothing is merged with it.
    """
    group = query.shape[1] // key.shape[1]
    if kind.softcap is not None or kind.sinks is not None:
        if batch.places:
            raise UnsupportedAttentionError("soft-capped scores and sinks are not merged")
        bias = batch.bias(span, kind.window, group, torch.float32)
        return _attend_modified(query * kind.scale, key, value, bias, kind), None
    if batch.places:
        bias = batch.bias(span, kind.window, group, query.dtype)
        return kernels.attend_with_lse(query, key, value, bias, kind.scale)
    return _attend_plain(batch, span, query, key, value, kind), None


def _no_lse(query: torch.Tensor) -> torch.Tensor:
    """Zeros, [1, heads, tokens]: nothing is merged with it."""
    return query.new_zeros(1, dtype=torch.float32).expand(query.shape[:3])


def _attend_plain(
    batch: Batch,
    span: Span,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kind: _Kind,
) -> torch.Tensor:
    """By whichever kernel is the fastest for these shapes: [1, heads, tokens, value dim]."""
    if batch.is_plain_causal(span, kind.window):
        return kernels.attend_causal(query, key, value, kind.scale)
    by_matmul = kernels.prefers_matmul(query, key)
    seen_by_all = batch.seen_by_all(span, kind.window) if by_matmul else 0
    group = query.shape[1] // key.shape[1]
    bias = batch.bias(span, kind.window, group, query.dtype, seen_by_all)
    if by_matmul:
        return kernels.attend_by_matmul(query, key, value, bias, kind.scale, kind.scratch)
    return kernels.attend(query, key, value, bias, kind.scale)


def _layer_index(module: torch.nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise UnsupportedAttentionError("attention modules don't know their layer index")
    return index


def _visible(rows: torch.Tensor, span: Span) -> torch.Tensor:
    """Return the rows a span sees: a view where they are contiguous."""
    parts = [rows[:, :, start:stop] for start, stop in span.visible]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _attend_modified(
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
    scores = torch.matmul(kernels.fold(query, key.shape[1]), key.transpose(-1, -2)).float()
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
    tokens, weights = batch.watched_in(range(span.start, span.stop))
    if not tokens:
        return
    own = [token - span.start for token in tokens]
    bias = batch.bias(span, kind.window, 1, torch.float32)
    if bias is not None:
        bias = bias[own].repeat(query.shape[1] // key.shape[1], 1)
    paid = _weights(query[:, :, own] * kind.scale, key, bias, kind)
    seen = weights @ paid.reshape(-1, len(own), paid.shape[-1]).sum(0)
    at = 0
    for first, last in span.visible:
        batch.attention[:, first:last] += seen[:, at : at + last - first]
        at += last - first
