"""A Llama as a GGUF file, for llama.cpp; without a vocabulary, as prompts are token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from pcache_core import CausalLM, OptionError


def write_gguf(lm: CausalLM, file: Path, gguf_type: str) -> None:
    """Write weights and configuration; matrices as `gguf_type` (q8_0, f16, bf16 or f32),
    vectors in fp32.

    Raises: OptionError: not a Llama, or rotary frequencies that are scaled.
    """
    config = lm.model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type != "llama" or rope.get("rope_type", "default") != "default":
        raise OptionError(
            f"{lm.name} is not a Llama with plain rotary positions, so it is not written as GGUF; "
            "give a file of it: --gguf FILE"
        )
    writer = gguf.GGUFWriter(file, "llama", use_temp_file=True)
    add_configuration(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in lm.model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        rows = in_ggml_order(name, parameter, config)
        kind = gguf.GGMLQuantizationType[gguf_type.upper() if rows.ndim > 1 else "F32"]
        known = names.get_name(name, try_suffixes=(".weight",))
        assert known is not None, f"Llamas have no {name}"
        writer.add_tensor(known, gguf.quants.quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_configuration(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def in_ggml_order(name: str, parameter: torch.Tensor, config: Any) -> NDArray[np.float32]:
    """Return it as fp32 [outputs, inputs]; queries' and keys' rows interleaved head by head.

    transformers rotates dimension i with i + half, llama.cpp 2i with 2i + 1.
    """
    rows: NDArray[np.float32] = parameter.detach().float().cpu().numpy()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return rows
    halves = rows.reshape(count, 2, rows.shape[0] // count // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
