"""Softmax attention of a few query rows over many key rows, in the form that is fastest for them.

Shapes: query [1, heads, tokens, dim]; key, value [1, kv heads, rows, dim]. Grouped-query heads are
folded into query rows, so keys and values are never copied per head.

Which form when is measured, not guessed: `benchmarks/attention.py` prints the table. In
bfloat16 on a CPU two matrix products with a softmax between them are faster than the flash kernel
as long as the scores of a head fit the cache; elsewhere the flash kernel is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_FEWEST_ROWS = 64
_SCORES_OF_A_HEAD = range(2**15, 2**21)
_SCORES_AT_ONCE = 2**20


class Scratch:
    """Memory for scores, kept between forwards: fresh memory costs more than the work in it."""

    def __init__(self) -> None:
        self._rounded = torch.empty(0)
        self._exact = torch.empty(0)

    def scores(
        self, shape: tuple[int, int], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two uninitialised tensors of `shape`, one of `dtype` and one of fp32."""
        count = shape[0] * shape[1]
        if self._exact.numel() < count or self._rounded.dtype != dtype:
            self._rounded = torch.empty(max(count, _SCORES_AT_ONCE), dtype=dtype)
            self._exact = torch.empty(max(count, _SCORES_AT_ONCE))
        return self._rounded[:count].view(shape), self._exact[:count].view(shape)


def fold(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Fold each group of query heads into query rows: [1, kv heads, group * tokens, dim]."""
    _, heads, tokens, dim = query.shape
    return query.reshape(1, kv_heads, heads // kv_heads * tokens, dim)


def prefers_matmul(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Return whether `attend_by_matmul` is the faster form for these shapes."""
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    return (
        query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and rows >= _FEWEST_ROWS
        and rows * key.shape[2] in _SCORES_OF_A_HEAD
    )


def attend_by_matmul(  # noqa: PLR0913 (what attention is made of)
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    scratch: Scratch,
    seen: int = 0,
) -> torch.Tensor:
    """Attention over rows that `bias` [group * tokens, rows] hides or not: [1, heads, tokens, dim].

    seen: how many rows at the beginning no query has hidden.

    Scores are rounded to the dtype by the first product; the second one gives what the rounding
    took, so that the softmax sees them as exact as a flash kernel does.
    """
    kv_heads, rows = key.shape[1], key.shape[2]
    queries = fold(query, kv_heads)[0]  # [kv heads, group * tokens, dim]
    output = queries.new_empty(*queries.shape[:2], value.shape[-1])
    at_once = max(1, _SCORES_AT_ONCE // rows)
    for head in range(kv_heads):
        keys = key[0, head].t()  # a product over all heads would copy them
        for start in range(0, queries.shape[1], at_once):
            part = slice(start, start + at_once)
            own = queries[head, part]
            rounded, exact = scratch.scores((len(own), rows), query.dtype)
            torch.addmm(rounded, own, keys, beta=0, alpha=scale, out=rounded)
            exact.copy_(rounded)
            torch.addmm(rounded, own, keys, beta=-1, alpha=scale, out=rounded)
            exact += rounded
            if bias is not None:
                exact[:, seen:] += bias[part, seen:]
            weights = rounded.copy_(torch.softmax(exact, dim=-1, out=exact))
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
