"""Tiny random models of many architectures, and a byte-level tokenizer that fits them all.

Default initialisation (standard deviation 0.02) makes attention nearly uniform, so that a wrong
mask or position hardly shows. `build` re-draws the weights: attention is peaky, errors are large.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
VOCAB_SIZE = 288
CONTEXT_LENGTH = 512
_MERGED = "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io"

_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT_LENGTH,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
_SLIDING = {"sliding_window": 12}
_SLIDING_OUTER = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    **_SLIDING,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_DEEPSEEK = {
    **_MLA,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "topk_group": 1,
}


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=128)


def _longrope(original_length: int) -> dict[str, Any]:
    return {
        "original_max_position_embeddings": original_length,
        **_rope(
            "longrope",
            short_factor=[1.0 + 0.1 * i for i in range(8)],
            long_factor=[2.0 + 0.5 * i for i in range(8)],
            original_max_position_embeddings=original_length,
        ),
    }


def _grouped(config: str, **overrides: Any) -> tuple[str, dict[str, Any]]:
    """The fields of a Llama-like configuration: grouped query heads, a gated feed-forward part."""
    return config, {**_DECODER, "num_key_value_heads": 2, "intermediate_size": 96, **overrides}


def _early(config: str, **overrides: Any) -> tuple[str, dict[str, Any]]:
    """The fields of a GPT-2-like configuration: neither key-value heads nor a feed-forward size."""
    return config, {**_DECODER, **overrides}


ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": _grouped("Llama"),
    "llama/llama3": _grouped(
        "Llama",
        **_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama/linear": _grouped("Llama", **_rope("linear", factor=4.0)),
    "llama/yarn": _grouped("Llama", **_YARN),
    "llama/dynamic": _grouped("Llama", **_rope("dynamic", factor=4.0)),
    "llama/dynamic-beyond": _grouped(
        "Llama", **_rope("dynamic", factor=4.0), max_position_embeddings=32
    ),
    "mistral": _grouped("Mistral", sliding_window=None),
    "mistral/sliding": _grouped("Mistral", **_SLIDING),
    "mixtral": _grouped("Mixtral", **_LOCAL_MOE, sliding_window=None),
    "qwen2": _grouped("Qwen2"),
    "qwen2/sliding": _grouped("Qwen2", use_sliding_window=True, max_window_layers=1, **_SLIDING),
    "qwen2_moe": _grouped("Qwen2Moe", **_MOE, shared_expert_intermediate_size=32),
    "qwen3": _grouped("Qwen3", head_dim=16),
    "qwen3_moe": _grouped("Qwen3Moe", head_dim=16, **_MOE),
    "granite": _grouped("Granite", attention_multiplier=0.25),
    "granitemoe": _grouped("GraniteMoe", **_LOCAL_MOE, attention_multiplier=0.25),
    "olmo": _grouped("Olmo"),
    "olmo2": _grouped("Olmo2"),
    "olmo3": _grouped("Olmo3", **_SLIDING_OUTER),
    "olmoe": _grouped("Olmoe", **_MOE),
    "stablelm": _grouped("StableLm", **_rope("default", partial_rotary_factor=0.25)),
    "phi": _grouped("Phi", **_rope("default", partial_rotary_factor=0.5)),
    "phi3": _grouped("Phi3", sliding_window=None),
    "phi3/longrope": _grouped("Phi3", sliding_window=None, **_longrope(256)),
    "phi3/longrope-beyond": _grouped("Phi3", sliding_window=None, **_longrope(24)),
    "phimoe": _grouped("Phimoe", **_LOCAL_MOE, sliding_window=None),
    "gemma": _grouped("Gemma", head_dim=16),
    "gemma2": _grouped("Gemma2", head_dim=16, query_pre_attn_scalar=16, **_SLIDING),
    "gemma3": _grouped("Gemma3Text", head_dim=16, query_pre_attn_scalar=16, **_SLIDING_OUTER),
    "gemma3n": _grouped(
        "Gemma3nText",
        head_dim=16,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
        **_SLIDING,
    ),
    "gemma4": _grouped(
        "Gemma4Text",
        head_dim=16,
        global_head_dim=32,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=8,
        **_SLIDING,
    ),
    "gpt_oss": _grouped(
        "GptOss",
        head_dim=16,
        **_LOCAL_MOE,
        **_SLIDING_OUTER,
        **_YARN,
    ),
    "smollm3": _grouped("SmolLM3", no_rope_layers=[1, 1, 0]),
    "cohere": _grouped("Cohere", logit_scale=1.0),
    "cohere2": _grouped(
        "Cohere2",
        logit_scale=1.0,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        **_SLIDING,
    ),
    "glm": _grouped("Glm", head_dim=16, **_rope("default", partial_rotary_factor=0.5)),
    "glm4": _grouped("Glm4", head_dim=16, **_rope("default", partial_rotary_factor=0.5)),
    "deepseek_v2": _grouped(
        "DeepseekV2", **_DEEPSEEK, q_lora_rank=None, n_group=1, topk_method="greedy"
    ),
    "deepseek_v3": _grouped("DeepseekV3", **_DEEPSEEK, q_lora_rank=32, n_group=2),
    "deepseek_v32": _grouped(
        "DeepseekV32",
        **_DEEPSEEK,
        q_lora_rank=32,
        n_group=2,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=16,
    ),
    "minicpm3": _grouped("MiniCPM3", **_MLA, q_lora_rank=32, dim_model_base=64, scale_emb=1),
    "minimax_m2": _grouped("MiniMaxM2", head_dim=16, **_LOCAL_MOE),
    "ernie4_5": _grouped("Ernie4_5", head_dim=16),
    "exaone4": _grouped("Exaone4", **_SLIDING_OUTER),
    "nemotron": _grouped("Nemotron", **_rope("default", partial_rotary_factor=0.5)),
    "hunyuan": _grouped("HunYuanDenseV1", head_dim=16),
    "starcoder2": _grouped("Starcoder2", sliding_window=None),
    "nanochat": _grouped("NanoChat"),
    "ministral3": _grouped(
        "Ministral3",
        head_dim=16,
        **_rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=64,
            llama_4_scaling_beta=0.5,
        ),
    ),
    "diffllama": _grouped("DiffLlama"),
    "gpt_neox": _grouped(
        "GPTNeoX", num_key_value_heads=4, **_rope("default", partial_rotary_factor=0.5)
    ),
    "gptj": _early("GPTJ", rotary_dim=8),
    "codegen": _early("CodeGen", rotary_dim=8),
    "falcon/rotary": _early("Falcon", alibi=False, new_decoder_architecture=False),
    "falcon/rotary-grouped": _early(
        "Falcon", alibi=False, new_decoder_architecture=True, num_kv_heads=2
    ),
    "falcon/alibi": _early("Falcon", alibi=True, multi_query=False, new_decoder_architecture=False),
    "gpt2": _early("GPT2"),
    "gpt_bigcode": _early("GPTBigCode"),
    "gpt_neo": _early(
        "GPTNeo", attention_types=[[["global", "local"], 1], [["global"], 1]], window_size=12
    ),
    "opt": _early("OPT", ffn_dim=96, word_embed_proj_dim=64),
    "biogpt": _early("BioGpt", intermediate_size=96, scale_embedding=False),
    "mpt": _early("Mpt", max_seq_len=CONTEXT_LENGTH),
    "bloom": _early("Bloom"),
    "llama4": _grouped(
        "Llama4Text",
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        intermediate_size_mlp=96,
        attention_chunk_size=12,
        no_rope_layers=[1, 1, 0],
        attn_temperature_tuning=False,
        interleave_moe_layer_step=1,
    ),
    "mamba": _early("Mamba", state_size=8),
    "mamba2": _early("Mamba2", state_size=8, num_heads=8, head_dim=16, n_groups=1),
    "jamba": _grouped(
        "Jamba",
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=8,
    ),
    "qwen3_next": _grouped(
        "Qwen3Next",
        num_hidden_layers=4,
        head_dim=16,
        **_MOE,
        shared_expert_intermediate_size=32,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    "lfm2": _grouped("Lfm2", layer_types=["conv", "full_attention", "conv"]),
    "bamba": _grouped(
        "Bamba", attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8
    ),
}


def build(name: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of `ARCHITECTURES[name]`: fp32, evaluation mode, weights drawn from `seed`."""
    config_name, fields = ARCHITECTURES[name]
    config = getattr(transformers, f"{config_name}Config")(**{**fields, **overrides})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        excite(model, seed=seed)
    return model.requires_grad_(False)


def excite(model: PreTrainedModel, *, seed: int, gain: float = 1.6) -> None:
    """Re-draw matrices at standard deviation gain/sqrt(fan-in), embeddings at 1, biases at 0.3.

    The Gemmas multiply their embeddings by sqrt(hidden_size), which is taken out: a residual stream
    that is nearly all embedding hides what attention does.
    """
    generator = torch.Generator().manual_seed(seed)
    is_gemma = model.config.model_type.startswith("gemma")
    table_scale = model.config.hidden_size**-0.5 if is_gemma else 1.0
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and min(parameter.shape) > 1:
            is_table = any(part in name for part in ("embed", "wte", "wpe"))
            scale = table_scale if is_table else gain / math.sqrt(parameter.shape[-1])
        elif "bias" in name:
            scale = 0.3
        elif "sinks" in name:
            scale = 1.0
        else:
            continue
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges, `VOCAB_SIZE` entries; adds `<bos>` by default."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(pair[0], pair[1]) for pair in _MERGED.split()]
    tokens = ["<pad>", "<bos>", "<eos>", *letters, *_MERGED.split()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
