"""A start from which a small Llama learns look-up in minutes; only the initial weights are special.

Random weights find the right kind of fact within minutes and then guess between its values for
hours: that a value belongs to a subject has no gradient before heads carry names from word to
word. So the embeddings get a direction per kind of name, layer 0 heads that look one to three
tokens back, layer 1 heads that fetch the nearest first name, surname, company and city, and
layers 2 and 3 heads that match what was fetched and copy what they attend to. Training freezes
the first two layers until kinds are told apart, or it unlearns the fetching (see `train.py`).
"""

from __future__ import annotations

import math

import torch
from network import TinyLlama
from torch import Tensor

_FETCHED = ("first", "surname", "company", "city")


@torch.no_grad()
def structured_start(network: TinyLlama, groups: dict[str, list[int]], seed: int) -> None:
    """Overwrite the random weights; `groups` maps kinds of names to the tokens of their members."""
    draw = _Draw(seed)
    shape = network.shape
    common = draw.normal(shape.width)
    kinds = {kind: draw.normal(shape.width) for kind in groups}
    embedding = draw.normal(shape.vocabulary, shape.width) + 0.6 * common
    for kind, members in groups.items():
        embedding[members] += kinds[kind]
    length = 0.1 * math.sqrt(shape.width)
    network.embedding.copy_(embedding / embedding.norm(dim=1, keepdim=True) * length)

    heads, dim, width = shape.heads, shape.head_dim, shape.width
    ones = common / common.norm()
    basis = draw.orthogonal(width, width)
    written = [basis[:, h * dim : (h + 1) * dim] for h in range(heads)]
    for index, block in enumerate(network.blocks):
        block.out.mul_(0.2)
        block.down.mul_(0.25)
        q, k, v = (w.view(heads, dim, width) for w in (block.query, block.key, block.value))
        out = block.out.view(width, heads, dim)
        for head in range(heads):
            if index == 0 and head < 3:
                _look_back(q[head], k[head], ones, (head + 1) * network.frequencies[:10])
                v[head] = draw.orthogonal(dim, width)
                out[:, head] = 0.1 * draw.orthogonal(width, dim)
            elif index == 1:
                kind = kinds[_FETCHED[head % len(_FETCHED)]]
                _fetch(q[head], k[head], ones, kind / kind.norm())
                v[head] = _without(draw.orthogonal(dim, width), kind / kind.norm(), ones)
                out[:, head] = 0.6 * written[head]
            elif index in (2, 3):
                fetched = [written[0], written[1]] if head < 2 else [written[head]]
                match = _slow(dim)[:, None] * sum(
                    draw.normal(dim, dim) @ source.T * dim**-0.5 * 0.8 for source in fetched
                )
                q[head], k[head] = match + 0.3 * q[head], match + 0.3 * k[head]
                v[head] = draw.orthogonal(dim, width)
                out[:, head] = 0.15 * v[head].T


def _look_back(q: Tensor, k: Tensor, ones: Tensor, angles: Tensor) -> None:
    """Attend to the token whose fast rotary angles lie `angles` behind."""
    half, fast = q.shape[0] // 2, len(angles)
    here, there = torch.zeros(q.shape[0]), torch.zeros(q.shape[0])
    here[:fast] = 1.0
    there[:fast], there[half : half + fast] = angles.cos(), angles.sin()
    q.mul_(0.2).add_(0.7 * here[:, None] * ones)
    k.mul_(0.2).add_(0.7 * there[:, None] * ones)


def _fetch(q: Tensor, k: Tensor, ones: Tensor, kind: Tensor) -> None:
    """Attend to the nearest token of a kind: by direction, and by middle rotary angles."""
    near = torch.zeros(q.shape[0])
    near[3:10] = 1.0
    q.mul_(0.1).add_(1.3 * near[:, None] * ones)
    k.mul_(0.1).add_(1.0 * near[:, None] * kind)


def _slow(dim: int) -> Tensor:
    """Selects the rotary pairs that hardly turn: content is compared, not distance."""
    half = dim // 2
    slow = torch.zeros(dim)
    slow[12:half] = slow[half + 12 :] = 1.0
    return slow


def _without(rows: Tensor, *directions: Tensor) -> Tensor:
    for direction in directions:
        rows = rows - (rows @ direction)[:, None] * direction
    return rows


class _Draw:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def orthogonal(self, rows: int, columns: int) -> Tensor:
        size = max(rows, columns)
        return torch.linalg.qr(self.normal(size, size))[0][:rows, :columns]
