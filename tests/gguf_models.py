"""Tiny random models written as GGUF files, as llama.cpp's converter writes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel

import tiny_models

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTROL = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
END_ID = tiny_models.VOCAB_SIZE + CONTROL.index("<|end|>")
_ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama"}
_HEAD_ORDER = ("llama", "mistral")
_NORM_PLUS_ONE = ("gemma2", "gemma3_text", "nemotron")


def build(name: str, **overrides: Any) -> PreTrainedModel:
    """A model of `tiny_models` with room for the control tokens."""
    return tiny_models.build(name, vocab_size=tiny_models.VOCAB_SIZE + len(CONTROL), **overrides)


def write(
    model: PreTrainedModel, path: Path, values: dict[str, Any] | None = None, *,
    chat_template: str | None = CHAT_TEMPLATE, architecture: str | None = None,
) -> Path:  # fmt: skip
    """Write a model with the byte tokenizer.

    values: metadata to set, or with None to leave out. architecture: to call it another than it is.
    """
    config = model.config
    architecture = architecture or _ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    metadata = {
        **_shape(config, architecture),
        **tokenizer_values(),
        "tokenizer.chat_template": chat_template,
        **(values or {}),
    }
    for key, value in metadata.items():
        if key != "general.architecture" and value is not None:
            _add(writer, key, value)
    for name, rows in _tensors(model, architecture).items():
        writer.add_tensor(name, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _shape(config: Any, architecture: str) -> dict[str, Any]:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    layer_norm = getattr(config, "layer_norm_eps", None) or getattr(config, "norm_epsilon", None)
    own = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": layer_norm,
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "vocab_size": config.vocab_size,
        **_scaling(rope, config),
    }
    return {f"{architecture}.{key}": value for key, value in own.items()}


def _scaling(rope: dict[str, Any], config: Any) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    original = rope.get("original_max_position_embeddings")
    named: dict[str, Any] = {"rope.scaling.original_context_length": original}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if kind == "yarn":
        return {**named, "rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"]}
    if kind == "longrope":
        scale = config.max_position_embeddings / original
        magnitude = math.sqrt(1 + math.log(scale) / math.log(original))
        return {**named, "rope.scaling.attn_factor": magnitude}
    return {}


def tokenizer_values() -> dict[str, Any]:
    """The metadata of the byte tokenizer and the control tokens."""
    vocabulary = tiny_models.tiny_tokenizer()
    tokens = sorted(vocabulary.get_vocab(), key=vocabulary.get_vocab().__getitem__)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    kinds = [control] * 3 + [normal] * (len(tokens) - 3) + [control] * len(CONTROL)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*tokens, *CONTROL],
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in tiny_models._MERGED.split()],
        "tokenizer.ggml.bos_token_id": tiny_models.BOS,
        "tokenizer.ggml.eos_token_id": tiny_models.EOS,
        "tokenizer.ggml.add_bos_token": True,
    }


def _tensors(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray[Any, Any]]:
    config = model.config
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found = {}
    for name, parameter in model.named_parameters():  # a tied head comes once
        rows = parameter.detach().float().numpy()
        if config.model_type in _NORM_PLUS_ONE and name.endswith("norm.weight"):
            rows = rows + 1
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = heads.get(name.split(".")[-2])
        if config.model_type in _HEAD_ORDER and count:
            halves = rows.reshape(count, 2, rows.shape[0] // count // 2, *rows.shape[1:])
            rows = halves.swapaxes(1, 2).reshape(rows.shape)
        found[names.get_name(name, (".weight", ".bias"))] = rows
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        for length in ("long", "short"):
            factors = np.array(rope[f"{length}_factor"], np.float32)
            found[f"rope_factors_{length}.weight"] = factors
    if rope.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = _llama3_divisors(model)
    return {name: np.ascontiguousarray(rows, np.float32) for name, rows in found.items()}


def _llama3_divisors(model: PreTrainedModel) -> np.ndarray[Any, Any]:
    """By how much each frequency is divided, from the model's own."""
    own = model.model.rotary_emb.inv_freq.numpy()
    theta = model.config.rope_parameters["rope_theta"]
    plain = theta ** (-np.arange(len(own)) / len(own))
    return plain / own
