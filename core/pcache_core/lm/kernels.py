"""Softmax attention of a few query rows over many key rows, in the form that is fastest for them.

Shapes: query [1, heads, tokens, dim]; key, value [1, kv heads, rows, dim]. Grouped-query heads are
folded into query rows, so keys and values are never copied per head.

Which form when is measured, not guessed: `benchmarks/attention.py` prints the table. In
bfloat16 on a CPU two matrix products with a softmax between them are faster than the flash kernel,
where there are scores enough to pay for the calls and not too many for the cache; elsewhere the
flash kernel is. Scores stay in fp32, as that kernel has them: rounded, they would lose too much.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_SCORES_OF_A_HEAD = range(2**18, 2**21)  # of keys and values
_SCORES_AT_ONCE = 2**20  # fit the cache


class Scratch:
    """Memory for scores, kept between forwards: fresh memory costs more than the work in it."""

    def __init__(self) -> None:
        self._scores = torch.empty(0)
        self._weights = torch.empty(0)

    def scores(self, rows: int, keys: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two uninitialised tensors, [rows, keys], of fp32 and of `dtype`."""
        count = rows * keys
        if self._scores.numel() < count or self._weights.dtype != dtype:
            self._scores = torch.empty(max(count, _SCORES_AT_ONCE))
            self._weights = torch.empty(max(count, _SCORES_AT_ONCE), dtype=dtype)
        return self._scores[:count].view(rows, keys), self._weights[:count].view(rows, keys)


def fold(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Fold each group of query heads into query rows: [1, kv heads, group * tokens, dim]."""
    _, heads, tokens, dim = query.shape
    return query.reshape(1, kv_heads, heads // kv_heads * tokens, dim)


def prefers_matmul(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Return whether `attend_by_matmul` is the faster form for these shapes."""
    scores = query.shape[1] // key.shape[1] * query.shape[2] * key.shape[2]
    return (
        query.dtype == torch.bfloat16 and query.device.type == "cpu" and scores in _SCORES_OF_A_HEAD
    )


def attend_by_matmul(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    scratch: Scratch,
) -> torch.Tensor:
    """Attention over rows, of which `bias` hides some: [1, heads, tokens, dim].

    bias: [group * tokens, last rows]; the rows before those are hidden from no query.
    """
    kv_heads, rows = key.shape[1], key.shape[2]
    queries = fold(query, kv_heads)[0]  # [kv heads, group * tokens, dim]
    output = queries.new_empty(*queries.shape[:2], value.shape[-1])
    at_once = max(1, _SCORES_AT_ONCE // rows)
    for head in range(kv_heads):
        keys = key[0, head].float().t()
        for start in range(0, queries.shape[1], at_once):
            part = slice(start, start + at_once)
            own = queries[head, part].float()
            scores, weights = scratch.scores(len(own), rows, query.dtype)
            torch.addmm(scores, own, keys, beta=0, alpha=scale, out=scores)
            if bias is not None:
                scores[:, rows - bias.shape[1] :] += bias[part]
            weights.copy_(torch.softmax(scores, dim=-1, out=scores))
            torch.mm(weights, value[0, head], out=output[head, part])
    return output.reshape(*query.shape[:3], value.shape[-1])


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Attention over rows that `bias` [group * tokens, rows] hides or not: [1, heads, tokens, dim].

    By the fastest kernel that torch has for the device and the dtype.
    """
    output = F.scaled_dot_product_attention(
        fold(query, key.shape[1]), key, value, attn_mask=bias, scale=scale
    )
    return output.reshape(*query.shape[:3], value.shape[-1])


def attend_causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Square and contiguous: the one case where a causal flag says the same as the rows do."""
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def attend_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend`, and the logarithm of each query's sum of exponentials, [1, heads, tokens] fp32.

    With it, attention over parts of the rows can be merged: see `merge`.
    """
    folded = fold(query, key.shape[1])
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            folded, key, value, attn_mask=bias, scale=scale
        )
    else:
        scores = torch.matmul(folded * scale, key.transpose(-1, -2)).float()
        scores = scores if bias is None else scores + bias
        lse = torch.logsumexp(scores, dim=-1)
        output = torch.matmul((scores - lse[..., None]).exp().to(value.dtype), value)
    return output.reshape(*query.shape[:3], value.shape[-1]), lse.reshape(query.shape[:3])


def merge(outputs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
    """Attention over all parts from attention over each: [heads, tokens, dim] of `outputs`' dtype.

    outputs: [parts, heads, tokens, dim]. lses: [parts, heads, tokens] fp32; -inf where a query sees
    nothing of a part.
    """
    weights = torch.softmax(lses, dim=0)
    merged = (outputs.float() * weights[..., None]).sum(0)
    return merged.to(outputs.dtype)
