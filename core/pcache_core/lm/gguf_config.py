"""A GGUF file's metadata into a transformers configuration and tokenizer, where its reader errs.

transformers reads shapes and the vocabulary. What follows is what its reader passes over: rotary
scaling and other rotary values, window, softcaps, ends of a turn, and how digits and spaces are
split. What can't be said in a configuration is refused, because it would compute something else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from pcache_core.errors import ModelError
from pcache_core.lm.gguf_file import Header

# transformers reads these with a reader of their own, or the file says less than their class knows.
_READ_WHOLE = ("qwen35", "qwen35moe", "lfm2", "gemma4")
_VALUES = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_LARGEST_GEMMAS = (("gemma2", 46), ("gemma3", 62))
_ENDS = ("eos", "eot", "eom")
# How llama.cpp treats vocabularies of these names.
_DIGITS_ALONE = (
    "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
)  # fmt: skip
_LIKE_LLAMA3 = (
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    "jina-v5-nano", "tekken",
)  # fmt: skip
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192


def complete_config(config: Any, header: Header, ends_of_turn: Sequence[int]) -> None:
    """Set what the file says and transformers did not read.

    ends_of_turn: ids that end an answer, besides those that the file names.
    Raises: ModelError: the file says something that transformers can't compute.
    """
    _check_heads(header)
    if "token_embd.weight" in header.tensors:
        config.vocab_size = header.tensors["token_embd.weight"].shape[0]
    metadata = header.metadata
    named = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in _ENDS]
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else []
    ids = list(dict.fromkeys(i for i in [*named, *known, *ends_of_turn] if i is not None))
    config.eos_token_id = ids if len(ids) > 1 else ids[0] if ids else None
    config.bos_token_id = metadata.get("tokenizer.ggml.bos_token_id")
    config.pad_token_id = metadata.get("tokenizer.ggml.padding_token_id")
    if header.architecture in _READ_WHOLE:
        return
    for key, name in _VALUES.items():
        value = header.get(key)
        if hasattr(config, name) and isinstance(value, (int, float)) and value:
            setattr(config, name, value)
    if hasattr(config, "query_pre_attn_scalar"):
        # llama.cpp knows the largest of each kind by its layers.
        is_largest = (header.architecture, config.num_hidden_layers) in _LARGEST_GEMMAS
        width = config.hidden_size // config.num_attention_heads if is_largest else config.head_dim
        config.query_pre_attn_scalar = width
    for name, tensor in (("attention_bias", "attn_output"), ("mlp_bias", "ffn_up")):
        if hasattr(config, name) and f"blk.0.{tensor}.bias" in header.tensors:
            setattr(config, name, True)
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, dict):
        # Windowed layers have their own angles.
        if "sliding_attention" in parameters and header.get("rope.freq_base_swa"):
            parameters["sliding_attention"]["rope_theta"] = header.get("rope.freq_base_swa")
        _complete_rope(config, parameters.get("full_attention", parameters), header)


def _check_heads(header: Header) -> None:
    """Raises: ModelError: transformers would leave queries and keys in llama.cpp's order."""
    kv_heads = header.get("attention.head_count_kv")
    if header.architecture == "llama" and kv_heads is None:
        raise _refused(header, "does not say how many heads its keys have")
    if header.architecture == "falcon" and kv_heads not in (None, 1):
        raise _refused(header, f"has {kv_heads} heads of keys in an order of its own")
    if header.get("expert_count") and header.architecture == "llama":
        raise _refused(header, f"has {header.get('expert_count')} experts")


def _refused(header: Header, reason: str) -> ModelError:
    return ModelError(
        f"{header.path} can't be loaded: a model of architecture {header.architecture!r} that "
        f"{reason}, which transformers does not read from GGUF; take the model in safetensors"
    )


def _complete_rope(config: Any, rope: dict[str, Any], header: Header) -> None:
    theta, dimensions = header.get("rope.freq_base"), header.get("rope.dimension_count")
    if theta:
        rope["rope_theta"] = float(theta)
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    if dimensions and "partial_rotary_factor" in rope:
        rope["partial_rotary_factor"] = dimensions / head_dim
    elif dimensions and dimensions != head_dim and not hasattr(config, "rotary_dim"):
        raise _refused(header, f"turns {dimensions} of its {head_dim} dimensions by position")
    scaling = _scaling(rope.get("rope_theta", 0), config, header)
    if scaling:
        rope |= scaling
        if hasattr(config, "original_max_position_embeddings"):
            config.original_max_position_embeddings = scaling["original_max_position_embeddings"]


def _scaling(theta: float, config: Any, header: Header) -> dict[str, Any] | None:
    """Rotary scaling as transformers writes it; None without. Raises: ModelError: unknown."""
    frequencies = header.numbers("rope_freqs.weight")
    if frequencies is not None and not np.allclose(frequencies, 1):
        return _llama3(theta, frequencies, header)
    long = header.numbers("rope_factors_long.weight")
    short = header.numbers("rope_factors_short.weight")
    factor = header.get("rope.scaling.factor") or header.get("rope.scale_linear") or 1.0
    original = header.get("rope.scaling.original_context_length")
    if long is not None and short is not None:
        original = original or config.max_position_embeddings
        return {
            "rope_type": "longrope",
            "long_factor": long.tolist(),
            "short_factor": short.tolist(),
            "original_max_position_embeddings": original,
            "factor": config.max_position_embeddings / original,
        } | _named("attention_factor", header.get("rope.scaling.attn_factor"))
    kind = header.get("rope.scaling.type") or ("linear" if factor != 1 else "none")
    if kind == "linear" and factor != 1:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        magnitude = header.get("rope.scaling.attn_factor")
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original or config.max_position_embeddings,
            **_named("attention_factor", magnitude and magnitude * (1 + 0.1 * math.log(factor))),
            **_named("beta_fast", header.get("rope.scaling.yarn_beta_fast")),
            **_named("beta_slow", header.get("rope.scaling.yarn_beta_slow")),
        }
    if kind in ("none", "linear"):
        return None
    raise _refused(header, f"scales its positions in the way {kind!r}")


def _named(name: str, value: float | None) -> dict[str, float]:
    return {} if value is None else {name: float(value)}


def _llama3(theta: float, factors: NDArray[np.float32], header: Header) -> dict[str, Any]:
    """Llama 3's scaling, of which the file has the result alone: a divisor for each frequency."""
    original = header.get("rope.scaling.original_context_length") or _LLAMA3_CONTEXT
    factor = round(float(factors.max()), 4)
    low, high = _LLAMA3_SCALING.values()
    waves = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-3):
        raise _refused(header, "scales its frequencies one by one, and not as Llama 3")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "original_max_position_embeddings": original,
        **_LLAMA3_SCALING,
    }


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, header: Header) -> str | None:
    """Split text as the file's vocabulary was learned.

    Returns: the name of a way to split that nobody here knows; None if all is well.
    """
    backend: Any = tokenizer.backend_tokenizer
    split = header.metadata.get("tokenizer.ggml.pre")
    if header.metadata.get("tokenizer.ggml.model") != "gpt2":
        if header.metadata.get("tokenizer.ggml.add_space_prefix") is False:
            _drop_space_prefix(backend)
        return None
    if split in _DIGITS_ALONE:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif split in _LIKE_LLAMA3:
        backend.model.ignore_merges = True
        if "tokenizer.ggml.add_bos_token" not in header.metadata:
            tokenizer.add_bos_token = True
            tokenizer.update_post_processor()
    return None if split in _known_splits() else str(split)


def _known_splits() -> set[str | None]:
    from transformers.integrations.gguf import gguf_tokenizer_mapping as reader

    like_gpt2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"}
    return {*getattr(reader, "GGUF_PRE_TOKENIZER_SPLITS", ()), *_DIGITS_ALONE, *like_gpt2}


def _drop_space_prefix(backend: Any) -> None:
    """Put no space before a text."""
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer.prepend_scheme = "never"
    elif isinstance(backend.normalizer, normalizers.Sequence):
        backend.normalizer = normalizers.Replace(" ", "\u2581")
    else:
        return
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def ends_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the chat template writes after an assistant's message, if it is special."""
    mark = "\ue0f0end\ue0f1"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # a template may refuse anything, and then says nothing of ends
        return []
    ids = tokenizer(text.partition(mark)[2].lstrip(), add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return [ids[0]] if ids and ids[0] in added and added[ids[0]].special else []
