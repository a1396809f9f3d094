"""The model that is measured: a saved one, or a random Llama of a known size."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from pcache_core import CausalLM, OptionError
from pcache_core.lm.loading import resolve

_DTYPES = {"auto": torch.bfloat16} | {
    name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")
}
# Small, so that what comes out depends on the whole prompt and not on its last token alone.
_EMBEDDING_STD = 0.1
_HEADROOM = 0.9  # of the memory that is available
# hidden, feed forward, layers, heads, key and value heads
SIZES = {
    "llama-tiny": (128, 256, 2, 4, 2),
    "llama-115m": (768, 1728, 12, 12, 4),
    "llama-0.5b": (1024, 5120, 24, 16, 4),
    "llama-1b": (2048, 5632, 22, 32, 4),
    "llama-7b": (4096, 11008, 32, 32, 32),
}


def load_model(
    model: str | None,
    random: str | None,
    dtype: str,
    device: str,
    *,
    context_tokens: int,
    seed: int,
) -> CausalLM:
    """Load `model`, or make the random one; `llama-115m` if neither is named.

    Raises: OptionError: both are named, or a name is unknown. ModelError.
    """
    if model is not None and random is not None:
        raise OptionError("--model and --random name two models; leave out one of them")
    if model is not None:
        return CausalLM.from_pretrained(model, dtype=dtype, device=device)
    if dtype not in _DTYPES:
        raise OptionError(f"unknown dtype {dtype!r}; use one of {', '.join(_DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return random_llama(
        random or "llama-115m", _DTYPES[dtype], device, context_tokens=context_tokens, seed=seed
    )


@torch.no_grad()
def random_llama(
    name: str, dtype: torch.dtype, device: str = "cpu", *, context_tokens: int, seed: int
) -> CausalLM:
    """Make a random Llama with the built-in tokenizer.

    Matrices have a standard deviation of 1/√inputs, so that attention is not uniform and a wrong
    mask or position shows in what comes out.
    Raises: OptionError: unknown name, or more weights than memory.
    """
    if name not in SIZES:
        raise OptionError(f"no random model {name!r}; there is {', '.join(SIZES)}")
    hidden, feed_forward, layers, heads, kv_heads = SIZES[name]
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context_tokens,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _check_memory(name, model.num_parameters() * dtype.itemsize, device)
    rotary = type(model.model.rotary_emb)(config)  # stays in fp32, as a loaded model's does
    model = model.to_empty(device=device)
    model.model.rotary_emb = rotary.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    for part, weight in model.named_parameters():
        if weight.dim() < 2:
            weight.fill_(1)
        else:
            std = _EMBEDDING_STD if "embed" in part else weight.shape[1] ** -0.5
            weight.normal_(std=std, generator=generator)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(resolve("builtin:tiny-rag")))
    lm = CausalLM(model.eval(), tokenizer, name=f"random {name}")
    lm.pack()  # as a model that is loaded
    return lm


def _check_memory(name: str, nbytes: int, device: str) -> None:
    """Compare with what is free; do nothing where that is not known, beyond Linux and CUDA."""
    meminfo = Path("/proc/meminfo")
    if device.startswith("cuda"):
        available = torch.cuda.mem_get_info(device)[0]
    elif meminfo.exists():
        available = int(meminfo.read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    else:
        return
    if nbytes > _HEADROOM * available:
        raise OptionError(
            f"{name} needs {nbytes / 1e9:.1f} GB for weights, {available / 1e9:.1f} GB is "
            f"available and {_HEADROOM:.0%} of that may be used; take a smaller model"
        )
