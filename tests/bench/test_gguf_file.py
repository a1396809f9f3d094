"""A Llama written as GGUF, read back by the gguf package and computed as llama.cpp does."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pcache_core import CausalLM, OptionError
from pcache_integrations.bench.gguf_file import GgufType, write_gguf

_HEADS, _KV_HEADS, _HEAD_DIM, _HIDDEN = 4, 2, 32, 128


def read(file: Path) -> dict[str, NDArray[np.float32]]:
    """Tensors by name, in fp32."""
    tensors = gguf.GGUFReader(file).tensors
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in tensors}


def rotate_pairs(rows: NDArray[np.float64], position: int) -> NDArray[np.float64]:
    """llama.cpp's layout: dimensions 2i and 2i + 1 are turned together. [heads, head_dim]."""
    angles = position * 10_000.0 ** (-np.arange(0, _HEAD_DIM, 2) / _HEAD_DIM)
    pairs = rows[:, 0::2] + 1j * rows[:, 1::2]
    turned = pairs * np.exp(1j * angles)
    return np.stack((turned.real, turned.imag), -1).reshape(rows.shape)


def test_attention_scores_are_those_of_the_model(tiny_llama: CausalLM, tmp_path: Path) -> None:
    write_gguf(tiny_llama, tmp_path / "model.gguf", "f32")
    tensors = read(tmp_path / "model.gguf")
    x = np.random.default_rng(0).standard_normal((2, _HIDDEN))
    positions = (3, 11)
    layer = tiny_llama.model.model.layers[1].self_attn
    with torch.no_grad():
        hidden = torch.tensor(x, dtype=torch.float32)[None]
        query = layer.q_proj(hidden).view(1, 2, _HEADS, _HEAD_DIM).transpose(1, 2)
        key = layer.k_proj(hidden).view(1, 2, _KV_HEADS, _HEAD_DIM).transpose(1, 2)
        cos, sin = tiny_llama.model.model.rotary_emb(hidden, torch.tensor([positions]))
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        expected = query[0, :, 1] @ key[0, 0, 0]
    key_rows = (tensors["blk.1.attn_k.weight"] @ x[0]).reshape(_KV_HEADS, _HEAD_DIM)
    query_rows = (tensors["blk.1.attn_q.weight"] @ x[1]).reshape(_HEADS, _HEAD_DIM)
    scores = rotate_pairs(query_rows, positions[1]) @ rotate_pairs(key_rows, positions[0])[0]
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("gguf_type", "error"), [("f32", 0.0), ("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 2e-2)]
)
def test_every_weight_is_there_as_precisely_as_asked(
    tiny_llama: CausalLM, tmp_path: Path, gguf_type: GgufType, error: float
) -> None:
    write_gguf(tiny_llama, tmp_path / "model.gguf", gguf_type)
    tensors = read(tmp_path / "model.gguf")
    parameters = dict(tiny_llama.model.named_parameters())
    assert len(tensors) == len(parameters)
    assert sum(t.size for t in tensors.values()) == sum(p.numel() for p in parameters.values())
    for name, parameter in {
        "token_embd.weight": parameters["model.embed_tokens.weight"],
        "output.weight": parameters["lm_head.weight"],
        "blk.0.ffn_down.weight": parameters["model.layers.0.mlp.down_proj.weight"],
        "blk.1.attn_output.weight": parameters["model.layers.1.self_attn.o_proj.weight"],
        "blk.1.ffn_norm.weight": parameters["model.layers.1.post_attention_layernorm.weight"],
    }.items():
        expected = parameter.detach().numpy()
        difference = np.linalg.norm(tensors[name] - expected) / np.linalg.norm(expected)
        assert difference <= error, name


def test_the_configuration_is_what_llama_cpp_asks_for(tiny_llama: CausalLM, tmp_path: Path) -> None:
    write_gguf(tiny_llama, tmp_path / "model.gguf", "q8_0")
    fields = {n: f.contents() for n, f in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["tokenizer.ggml.model"] == "no_vocab"
    llama = {n.removeprefix("llama."): v for n, v in fields.items() if n.startswith("llama.")}
    assert llama == {
        "vocab_size": 32_000,
        "context_length": 1024,
        "embedding_length": _HIDDEN,
        "block_count": 2,
        "feed_forward_length": 256,
        "attention.head_count": _HEADS,
        "attention.head_count_kv": _KV_HEADS,
        "attention.key_length": _HEAD_DIM,
        "attention.value_length": _HEAD_DIM,
        "rope.dimension_count": _HEAD_DIM,
        "rope.freq_base": 10_000.0,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    }


def test_what_is_no_plain_llama_is_refused(tmp_path: Path) -> None:
    lm = CausalLM.from_pretrained("builtin:tiny-rag")
    lm.model.config.rope_parameters["rope_type"] = "linear"
    with pytest.raises(OptionError, match="give a file of it: --gguf FILE"):
        write_gguf(lm, tmp_path / "model.gguf", "q8_0")
