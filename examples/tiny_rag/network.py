"""A Llama for training on many questions about the same documents at once.

Documents and questions run as two streams: the documents once, and each question, with its
answer, behind them, seeing the documents and itself. The last layer and the vocabulary are
computed at answer positions only. `to_llama` gives the plain `LlamaForCausalLM` of the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

MAX_POSITIONS = 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network: 5 layers of width 256 and 2,840 tokens make 3.5 million weights."""

    vocabulary: int
    width: int = 256
    layers: int = 5
    heads: int = 4
    hidden: int = 384
    rope_theta: float = 1e5
    epsilon: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(slots=True)
class Inputs:
    """One training batch; B contexts of D tokens, each with N questions of L tokens.

    documents, document_positions [B, D]; questions, question_positions [B, N*L]
    padding [B, 1, 1, D] and causal [L, L]: additive masks
    answer_rows [A]: flat indices into the questions of the tokens that predict `targets` [A];
    kinds [A] and pairs [A]: which set, and which question, each of them belongs to.
    """

    documents: Tensor
    document_positions: Tensor
    questions: Tensor
    question_positions: Tensor
    padding: Tensor
    causal: Tensor
    answer_rows: Tensor
    targets: Tensor
    kinds: Tensor
    pairs: Tensor
    num_tokens: int

    def to(self, device: torch.device) -> Inputs:
        """The batch on a device."""
        values = {name: getattr(self, name) for name in self.__slots__}
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}
        return Inputs(**moved)


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), epsilon)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    """One decoder layer over both streams."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        inner, width, hidden = shape.heads * shape.head_dim, shape.width, shape.hidden
        small = 1 / math.sqrt(2 * shape.layers)

        def weight(rows: int, columns: int, gain: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns) * columns**-0.5 * gain)

        self.input_norm = nn.Parameter(torch.ones(width))
        self.mlp_norm = nn.Parameter(torch.ones(width))
        self.query, self.key = weight(inner, width), weight(inner, width)
        self.value, self.out = weight(inner, width), weight(width, inner, small)
        self.gate, self.up = weight(hidden, width), weight(hidden, width)
        self.down = weight(width, hidden, small)

    def forward(
        self, xd: Tensor, xq: Tensor, batch: Inputs, angles: _Angles, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Both streams [B, D, width] and [B, N*L, width]; only `rows` of the second if given."""
        shape = self.shape
        hd = _normed(xd, self.input_norm, shape.epsilon)
        hq = _normed(xq, self.input_norm, shape.epsilon)
        kd = self._heads(hd, self.key, angles.documents)
        vd = self._heads(hd, self.value)
        attended = self._questions_attend(hq, kd, vd, batch, angles)
        if rows is not None:
            flat = attended.reshape(-1, attended.shape[-1])[rows]
            kept = xq.reshape(-1, shape.width)[rows]
            return xd, self._mlp(kept + F.linear(flat, self.out.to(flat.dtype)))
        xq = self._mlp(xq + F.linear(attended, self.out.to(attended.dtype)))
        qd = self._heads(hd, self.query, angles.documents)
        od = F.scaled_dot_product_attention(qd, kd, vd, is_causal=True)
        od = od.transpose(1, 2).flatten(2)
        return self._mlp(xd + F.linear(od, self.out.to(od.dtype))), xq

    def _questions_attend(
        self, hq: Tensor, kd: Tensor, vd: Tensor, batch: Inputs, angles: _Angles
    ) -> Tensor:
        """Attention of every question over the documents and itself: [B, N*L, heads*head_dim]."""
        heads, dim = self.shape.heads, self.shape.head_dim
        q = self._heads(hq, self.query, angles.questions) * dim**-0.5
        k = self._heads(hq, self.key, angles.questions)
        v = self._heads(hq, self.value)
        size, length = q.shape[0], batch.causal.shape[0]
        single = (size, heads, -1, length, dim)  # [B, heads, N, L, head_dim]
        over_documents = q @ kd.transpose(-1, -2) + batch.padding.to(q.dtype)
        over_itself = q.reshape(single) @ k.reshape(single).transpose(-1, -2)
        over_itself = (over_itself + batch.causal.to(q.dtype)).flatten(2, 3)
        p = torch.cat([over_documents, over_itself], -1).softmax(-1)
        pd, pq = p.split([kd.shape[2], length], -1)
        itself = pq.reshape(*single[:-1], length) @ v.reshape(single)
        out = pd @ vd + itself.flatten(2, 3)
        return out.transpose(1, 2).flatten(2)

    def _heads(
        self, x: Tensor, weight: Tensor, angles: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        shape = (*x.shape[:2], self.shape.heads, self.shape.head_dim)
        y = F.linear(x, weight.to(x.dtype)).view(shape).transpose(1, 2)  # [B, heads, T, head_dim]
        return y if angles is None else _rotated(y, *angles)

    def _mlp(self, x: Tensor) -> Tensor:
        h = _normed(x, self.mlp_norm, self.shape.epsilon)
        gated = F.silu(F.linear(h, self.gate.to(x.dtype))) * F.linear(h, self.up.to(x.dtype))
        return x + F.linear(gated, self.down.to(x.dtype))


@dataclass(slots=True)
class _Angles:
    documents: tuple[Tensor, Tensor]
    questions: tuple[Tensor, Tensor]


class TinyLlama(nn.Module):
    """The network. Weights are kept in float32, activations run in `dtype`."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.embedding = nn.Parameter(torch.randn(shape.vocabulary, shape.width) * 0.02)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.width))
        steps = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
        self.register_buffer("frequencies", shape.rope_theta**-steps, persistent=False)

    def forward(self, batch: Inputs) -> Tensor:
        """Logits [A, vocabulary] of the tokens that predict answers."""
        embedding = self.embedding.to(self.dtype)
        xd, xq = F.embedding(batch.documents, embedding), F.embedding(batch.questions, embedding)
        angles = _Angles(
            self._angles(batch.document_positions), self._angles(batch.question_positions)
        )
        for index, block in enumerate(self.blocks):
            last = index == self.shape.layers - 1
            xd, xq = block(xd, xq, batch, angles, batch.answer_rows if last else None)
        return F.linear(_normed(xq, self.norm, self.shape.epsilon), embedding).float()

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None, :, None].float() * self.frequencies  # [B, 1, T, head_dim/2]
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def matrices(self) -> list[nn.Parameter]:
        """The weights inside blocks that Muon trains."""
        return [p for block in self.blocks for p in block.parameters() if p.dim() == 2]

    def others(self) -> list[nn.Parameter]:
        """The weights that AdamW trains: embedding and norms."""
        mine = {id(p) for p in self.matrices()}
        return [p for p in self.parameters() if id(p) not in mine]


def to_llama(network: TinyLlama, special: dict[str, int]) -> LlamaForCausalLM:
    """The same weights in transformers' own class; `special`: bos, eos and pad token ids."""
    shape = network.shape
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads, head_dim=shape.head_dim,
        max_position_embeddings=MAX_POSITIONS, rms_norm_eps=shape.epsilon,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta}, **special,
    )  # fmt: skip
    weights = {
        "model.embed_tokens.weight": network.embedding,
        "lm_head.weight": network.embedding,
        "model.norm.weight": network.norm,
    }
    names = {
        "self_attn.q_proj": "query", "self_attn.k_proj": "key", "self_attn.v_proj": "value",
        "self_attn.o_proj": "out", "mlp.gate_proj": "gate", "mlp.up_proj": "up",
        "mlp.down_proj": "down", "input_layernorm": "input_norm",
        "post_attention_layernorm": "mlp_norm",
    }  # fmt: skip
    for index, block in enumerate(network.blocks):
        for theirs, ours in names.items():
            weights[f"model.layers.{index}.{theirs}.weight"] = getattr(block, ours)
    llama = LlamaForCausalLM(config)
    llama.load_state_dict({k: v.detach().clone().float().cpu() for k, v in weights.items()})
    return llama.eval()
