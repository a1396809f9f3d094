"""A Llama as a GGUF file, for llama.cpp; without a vocabulary, as prompts are token ids."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from pcache_core import CausalLM, DependencyError, OptionError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray

GgufType = Literal["q8_0", "f16", "bf16", "f32"]
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def check_gguf_type(name: str) -> GgufType:
    """Return it if it is one. Raises: OptionError."""
    for known in GGUF_TYPES:
        if name == known:
            return known
    raise OptionError(f"unknown --gguf-type {name!r}; use one of {', '.join(GGUF_TYPES)}")


def write_gguf(lm: CausalLM, file: Path, gguf_type: GgufType) -> None:
    """Write weights and configuration; matrices as `gguf_type`, vectors in fp32.

    Raises: OptionError: no Llama, or rotary frequencies that are scaled. DependencyError.
    """
    if find_spec("gguf") is None:
        raise DependencyError(
            "a GGUF file is written with the gguf package; pip install 'pcache-integrations[bench]'"
        )
    from gguf import GGUFWriter
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    config = lm.model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type != "llama" or rope.get("rope_type", "default") != "default":
        raise OptionError(
            f"{lm.name} is no Llama with plain rotary positions, so it is not written as GGUF; "
            "give a file of it: --gguf FILE"
        )
    writer = GGUFWriter(file, "llama", use_temp_file=True)
    _add_configuration(writer, config)
    for name, parameter in lm.model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        rows = _in_ggml_order(name, parameter, config)
        kind = GGMLQuantizationType[gguf_type.upper() if rows.ndim > 1 else "F32"]
        writer.add_tensor(gguf_name(name), quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_configuration(writer: GGUFWriter, config: Any) -> None:
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


def gguf_name(name: str) -> str:
    """A parameter's name in a GGUF file. Raises: KeyError: Llamas have no such parameter."""
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, part = rest.rpartition(".")
    return f"blk.{layer}.{_LAYER_NAMES[module]}.{part}"


def _in_ggml_order(name: str, parameter: torch.Tensor, config: Any) -> NDArray[np.float32]:
    """[outputs, inputs] fp32; queries' and keys' rows interleaved head by head.

    transformers rotates dimension i with i + half, llama.cpp 2i with 2i + 1.
    """
    rows: NDArray[np.float32] = parameter.detach().float().cpu().numpy()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return rows
    halves = rows.reshape(count, 2, rows.shape[0] // count // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
